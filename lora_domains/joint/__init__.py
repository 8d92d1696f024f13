"""Several adapters trained together: their rows share passes through the frozen base."""
