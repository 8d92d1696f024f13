"""Items: the scores of all contenders on one row, as ``items.jsonl`` stores them.

``verdict.scores`` says what an item holds. Figures, comparisons and gates are computed from items
without a model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_domains.data.identity import keyed_digest
from lora_domains.data.splits import together
from lora_domains.inference.scores import TEXT, Scores, without_text
from lora_domains.tokenization.encoded import EncodedRow

Items = list[dict[str, Any]]


def make_items(
    name: str, rows: Sequence[EncodedRow], contenders: Mapping[str, Scores], key: bytes,
    show_text: bool = False,
) -> Items:  # fmt: skip
    """One item for each row of the set ``name``. Texts and groups are stored as keyed digests.

    The text itself, the reference and the generated answers are stored with ``show_text`` only.
    """
    items = []
    for i, ((example, encoded), group) in enumerate(zip(rows, groups_of(rows), strict=True)):
        item: dict[str, Any] = {"set": name, "id": encoded.id, "target": encoded.target}
        if encoded.truth:
            item["truth"] = [stored(value) for value in encoded.truth]
        text = example.prompt or example.answer
        item["digest"] = keyed_digest(text, key)
        if group is not None:
            # A group is often a person, whose name is as private as the row.
            item["group"] = keyed_digest(group, key)[:16]
        if example.slices:
            item["slices"] = dict(example.slices)
        if show_text:
            item["text"] = text
        answers = {who: scores[i][TEXT] for who, scores in contenders.items() if TEXT in scores[i]}
        if show_text and answers:
            item["answers"] = {"reference": example.answer.strip(), **answers}
        item["scores"] = {
            contender: {k: stored(v) for k, v in without_text(scores[i]).items()}
            for contender, scores in contenders.items()
        }
        items.append(item)
    return items


def stored(value: Any) -> Any:
    """``value`` as an item holds it: rounded, and None where it is not a finite number."""
    if isinstance(value, list):
        return [stored(one) for one in value]
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def question_items(
    rows: Sequence[EncodedRow], parts: Sequence[str], contenders: Mapping[str, Scores], key: bytes
) -> Items:
    """Items of one probe, each with its part under ``suite``.

    A generated answer counts like a choice: 1 is the correct one.
    """
    scores = {name: [as_choice(score) for score in of_one] for name, of_one in contenders.items()}
    items = make_items("general", rows, scores, key)
    for item, part in zip(items, parts, strict=True):
        item["target"] = 1 if item["target"] < 0 else item["target"]
        item["suite"] = part
    return items


def as_choice(score: dict[str, float]) -> dict[str, float]:
    """The record of a generated answer as that of a choice: prediction 1 is the correct answer."""
    return score if "prediction" in score else score | {"prediction": int(score["exact"])}


def text_items(
    rows: Sequence[EncodedRow], moved: Sequence[Mapping[str, float]], suite: str, key: bytes
) -> Items:
    """Items of general text, from the fields of ``drift`` of each row."""
    scores: dict[str, Scores] = {"base": [], "adapter": []}
    for fields in moved:
        tokens = int(fields["tokens"])
        scores["base"].append({"nats": fields["base"], "tokens": tokens})
        scores["adapter"].append({"nats": fields["adapter"], "tokens": tokens, "kl": fields["kl"]})
    return [item | {"suite": suite} for item in make_items("text", rows, scores, key)]


def groups_of(rows: Sequence[EncodedRow]) -> list[str | None]:
    """The group of each row; None where it is independent of all others.

    Rows of one declared group are not independent, nor are the windows of a long text and rows that
    repeat another one (``splits.together``).
    """
    examples = [example for example, _ in rows]
    groups: list[str | None] = [example.group for example in examples]
    for unit in together(examples):
        if len(unit) > 1:
            declared = (examples[i].group for i in unit if examples[i].group)
            name = next(declared, examples[unit[0]].id)
            for i in unit:
                groups[i] = name
    return groups
