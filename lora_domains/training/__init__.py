"""One training run: plan, loop, retention, checkpoints."""
