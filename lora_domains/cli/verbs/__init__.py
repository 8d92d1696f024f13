"""The verbs of ``lora-domains``, a file for each group."""
