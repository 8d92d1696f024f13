"""From a file to token ids: read, check, split, search for leaks, tokenise. No torch."""
