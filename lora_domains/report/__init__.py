"""Cards and reports, and the views of them. No torch."""
