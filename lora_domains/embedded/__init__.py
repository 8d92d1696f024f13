"""The embedded base: a tiny pretrained model, and the small world that it was trained on.

A first run must work offline in a minute, on a model that was really trained and really knows
something, because only then can forgetting be measured. The base was trained on `facts`, `prose`
and `habits`, and never on the rows of `domains`; `world` draws texts and questions from them.
`benchmarks/embedded` builds the base and its general text. Nothing here imports torch.
"""

from pathlib import Path

BASE_PATH = Path(__file__).parent / "base"
"""Folder of the embedded base; loads with plain `AutoModelForCausalLM.from_pretrained`."""
GENERAL_TEXT_PATH = Path(__file__).parent / "general_text.jsonl"
"""General text the base never saw; written by `benchmarks/embedded/general_text.py`."""
