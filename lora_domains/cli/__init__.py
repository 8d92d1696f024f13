"""The ``lora-domains`` command and what recipes run."""
