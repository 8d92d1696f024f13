"""Base, adapter and baselines scored on the same items, up to the verdict."""
