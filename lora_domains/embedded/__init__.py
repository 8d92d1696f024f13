"""The embedded default: a tiny pretrained model and the small world it was trained on.

A first run must work offline in a minute, on a model that really was trained and really knows
something: only then can forgetting be seen. `facts`, `prose` and `habits` are what the base was
taught, `domains` is what it was never shown, `world` puts them together and `build` trains it.
Nothing here imports torch.
"""

from pathlib import Path

BASE_PATH = Path(__file__).parent / "base"
"""Folder of the embedded base; loads with plain `AutoModelForCausalLM.from_pretrained`."""
GENERAL_TEXT_PATH = Path(__file__).parent / "general_text.jsonl"
"""General text the base never saw; written by `benchmarks/embedded/general_text.py`."""
