"""From an example to token ids, through the base's chat template where it has one. No torch."""
