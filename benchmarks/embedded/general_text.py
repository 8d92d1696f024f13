"""Draw the embedded general text: `python -m benchmarks.embedded.general_text`.

Writes `lora_domains/embedded/general_text.jsonl`, the same bytes on every machine. The texts are of
the kinds that the embedded base was trained on, and none is in its corpus. No validation text is
contained in a training text, and no test text in either: training and the choice of a checkpoint
must not read what drift is measured on.
"""

import json

from lora_domains.embedded import GENERAL_TEXT_PATH
from lora_domains.embedded.world import general_text

SIZES = {"train": 2000, "validation": 200, "test": 200}
"""Texts for training, for selecting a checkpoint, and for measuring drift."""


def draw() -> dict[str, list[str]]:
    """The texts of each split, in order."""
    splits: dict[str, list[str]] = {}
    for split, size in SIZES.items():
        earlier = [text for texts in splits.values() for text in texts]
        # No text is drawn for two splits, but a text of one line may be part of a longer one.
        drawn = general_text(split, 2 * size if earlier else size)
        apart = [text for text in drawn if not any(text in longer for longer in earlier)]
        splits[split] = apart[:size]
    return splits


def lines() -> str:
    """The file: one JSON object for each text."""
    rows = [{"split": split, "text": text} for split, texts in draw().items() for text in texts]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    GENERAL_TEXT_PATH.write_text(lines(), encoding="utf-8")
