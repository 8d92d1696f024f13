"""From scored items to the verdict of a card's entry; the look at the test set comes first.

Whatever gives an adapter a verdict on test rows goes through here, so that no look is forgotten and
every verdict is held to the level that the looks before it leave (``looks``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.data.prepare import Prepared
from lora_domains.domain import Domain, as_record
from lora_domains.errors import UsageError
from lora_domains.evaluation.contenders import Scored
from lora_domains.report.report import figures
from lora_domains.verdict.ledger import look, set_digest, settle


def judged_by(
    domain: Domain, scored: Scored, base_changed: bool, suite: str, knowledge: str
) -> dict[str, Any]:
    """What a card keeps beside its items so that its figures can be computed anew (``judged``)."""
    task = domain.task
    return {
        "metric": task.metric,
        "labels": list(task.labels or ()),
        "positive": task.positive,
        "base_changed": base_changed,
        "largest_move": scored.largest_move,
        "loss": task.loss_unit,
        "suite": suite,
        "knowledge": knowledge,
        "threshold": scored.threshold,
    }


def hold_to(entry: dict[str, Any], domain: Domain) -> None:
    """Judge by task and gates of ``domain``: today's. Those it was trained with are kept."""
    now = {key: as_record(domain)[key] for key in ("task", "gates")}
    before = {key: entry["settings"][key] for key in now}
    if before != now:
        entry.setdefault("trained_with", before)
    entry["settings"] |= now


def check_same_rows(name: str, entry: Mapping[str, Any], prepared: Prepared, split: str) -> None:
    """Raise UsageError where ``split`` is not what the adapter of ``entry`` was trained with."""
    if entry.get("data", {}).get(split) != prepared.digests[split]:
        raise UsageError(
            where=name,
            expected=f"the {split} rows of its training: leaks, overfitting, baselines and scales "
            "are judged by them",
            found="other rows, or another split or sample of them",
            hint="Give the rows, the seed and the limit of its training.",
        )


def check_same_length(name: str, trained: int, now: int) -> None:
    """Raise UsageError where rows are cut elsewhere than when the adapter ``name`` was trained."""
    if trained != now:
        raise UsageError(
            where=name,
            expected=f"rows of at most {trained} tokens, as it was trained and is used",
            found=f"at most {now}",
            hint="Give the max_length of its training.",
        )


def judge(entry: dict[str, Any], items: Sequence[dict[str, Any]], out: Path) -> None:
    """Figures, gates and verdict of ``entry`` from ``items`` that were scored just now.

    Written down in the ledger of ``out`` before and after: a run that is stopped in between has
    looked all the same. Every process calls this; the first one writes.
    """
    tests = {"test_set": set_digest(items), "adapter": entry["sha256"]}
    rows = sum(item["set"] == "test" for item in items)
    found = distributed.on_main(lambda: look(out, **tests, domain=entry["domain"], rows=rows))
    entry.pop("seeds", None)  # of an evaluation before this one
    entry["looks"] = asdict(found)
    entry.update(figures(entry, items))
    distributed.on_main(lambda: settle(out, **tests, verdict=entry["verdict"]))
