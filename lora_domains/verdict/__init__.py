"""From per-item scores to metrics, gates and a verdict. No torch, no model."""
