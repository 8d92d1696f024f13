"""The command line: verbs, flags and recipes."""
