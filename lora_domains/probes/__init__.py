"""General-knowledge suites: questions and texts that no adapter is trained on."""
