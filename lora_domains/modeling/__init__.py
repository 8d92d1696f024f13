"""The frozen base and the LoRA adapters that are applied to it."""
