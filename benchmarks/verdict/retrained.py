"""How often do five retrained adapters, none of them worse, seem worse than a release?

    python benchmarks/verdict/retrained.py      # about two minutes on one core, no model

Each adapter of a release is trained again: a share of its answers is drawn anew, from the same true
accuracy. ``report --against`` compares F1 on 500 test rows and accuracy on 700 general questions
of each, as done here with the package's own functions. Beside Holm's method stands what a bound of
95 % for each figure gives. Also simulated: how often one adapter of five that truly lost is found,
and how small losses creep past a comparison with the last adapter but not with a pinned one.
Gates on test rows turn to *fail* by chance too, where an adapter is at their limit: that is
listed, and does not make a report worse.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.stats.comparisons import compare_accuracy, compare_f1, holm
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import judge_all
from lora_domains.verdict.ledger import Standing, level
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retrained.json"
ADAPTERS, ROWS, QUESTIONS, POSITIVES = 5, 500, 700, 0.4
FOUND, ALARMS, KNOWN = 0.9, 0.05, 0.95
"""Share of positives found, of false alarms, and of questions answered correctly."""
Answers = np.ndarray
Worse = Callable[[float], bool]
"""Whether a figure is worse by its bound at a level."""


def answers(rng: np.random.Generator, chance: np.ndarray) -> Answers:
    return rng.random(len(chance)) < chance


def retrained(
    rng: np.random.Generator, old: Answers, chance: np.ndarray, redrawn: float
) -> Answers:
    """``old`` with a share ``redrawn`` of the answers drawn anew."""
    return np.where(rng.random(len(old)) < redrawn, answers(rng, chance), old)


def comparisons(
    rng: np.random.Generator, redrawn: float, lost: float = 0.0
) -> dict[tuple[int, str], Worse]:
    """F1 and general knowledge of each adapter.

    Among the redrawn answers of the first one, ``lost`` fewer of the positives are found.
    """
    compared: dict[tuple[int, str], Worse] = {}
    for adapter in range(ADAPTERS):
        truth = rng.random(ROWS) < POSITIVES
        before = np.where(truth, FOUND, ALARMS)
        now = before - np.where(truth & (adapter == 0), lost, 0.0)
        old = answers(rng, before)
        new = retrained(rng, old, now, redrawn)
        known = np.full(QUESTIONS, KNOWN)
        was = answers(rng, known)
        is_ = retrained(rng, was, known, redrawn)
        compared[adapter, "f1"] = partial(f1_is_worse, truth, old, new)
        compared[adapter, "general"] = partial(general_is_worse, was, is_)
    return compared


def f1_is_worse(truth: Answers, old: Answers, new: Answers, level: float) -> bool:
    # The bounds contain the difference, so one above 0 need not be bounded.
    fell = f1_score(truth, new) < f1_score(truth, old)
    return fell and compare_f1(truth, old, new, 1, level=level).upper < 0


def general_is_worse(was: Answers, now: Answers, level: float) -> bool:
    return compare_accuracy(was, now, level=level).upper < 0


def f1_score(truth: Answers, predicted: Answers) -> float:
    return 2 * float((truth & predicted).sum()) / max(1, int(truth.sum() + predicted.sum()))


def flagged(redrawn: float, runs: int, lost: float = 0.0) -> dict[str, float]:
    """The share of runs in which a figure of any adapter (with ``lost``: F1 of the first) is worse.

    Without ``lost`` every flag is false.
    """
    rng = np.random.default_rng([18, round(1000 * redrawn), round(1000 * lost)])
    counts = {"holm": 0, "each at 95 %": 0}
    for _ in range(runs):
        compared = comparisons(rng, redrawn, lost)
        wanted = [(0, "f1")] if lost else list(compared)
        outcomes = holm(compared, bool)
        counts["holm"] += any(outcomes[key] for key in wanted)
        counts["each at 95 %"] += any(compared[key](0.95) for key in wanted)
    return {rule: count / runs for rule, count in counts.items()}


LIMITS = {
    "recall at its floor": ((0.80, 0.06), (0.50, 0.10)),
    "no better than its rival": ((0.90, 0.05), (0.90, 0.05)),
    "above floors and rival": ((0.90, 0.04), (0.80, 0.06)),
}
"""Recall and share of false alarms of the adapter and of its rival."""


def gates_turned(adapter: tuple[float, float], rival: tuple[float, float], runs: int) -> float:
    """The share of runs in which gain, recall or precision of an unchanged adapter turns to fail.

    30 % of the answers of five adapters are redrawn.
    """
    rng, turned = np.random.default_rng([20, round(1000 * adapter[0])]), 0
    for _ in range(runs):
        worse = False
        for _ in range(ADAPTERS):
            truth = rng.random(ROWS) < POSITIVES
            chance = np.where(truth, *adapter)
            base, old = answers(rng, np.where(truth, *rival)), answers(rng, chance)
            new = retrained(rng, old, chance, 0.3)
            before, now = (failing_gates(truth, base, each) for each in (old, new))
            worse |= bool(now - before)
        turned += worse
    return turned / runs


def failing_gates(truth: Answers, base: Answers, adapter: Answers) -> set[str]:
    items = [
        {"set": "test", "target": int(target), "scores": {
            "base": {"prediction": int(one)}, "adapter": {"prediction": int(two)},
        }}
        for target, one, two in zip(truth, base, adapter, strict=True)
    ]  # fmt: skip
    standing = Standing("simulated", 1, 5, level(5))
    evidence = Evidence(
        ScoreTable(items), METRICS["f1"], ["routine", "urgent"], 1, evaluations=standing
    )
    results = judge_all(evidence, {}, ("gain", "recall", "precision"))
    return {result.name for result in results if result.verdict == "fail"}


def creeping(runs: int, steps: int = 8, loss: float = 0.01) -> dict[str, float]:
    """The share of runs in which ``steps`` trainings, each ``loss`` of recall worse, are noticed.

    All five adapters lose. "last": each is compared with the one before; "pinned": with the first.
    """
    rng = np.random.default_rng(19)
    counts = {"last": 0, "pinned": 0}
    for _ in range(runs):
        truth = rng.random((ADAPTERS, ROWS)) < POSITIVES
        last = first = rng.random(truth.shape) < np.where(truth, FOUND, ALARMS)
        noticed = dict.fromkeys(counts, False)
        for step in range(1, steps + 1):
            chance = np.where(truth, FOUND - loss * step, ALARMS)
            anew = rng.random(truth.shape) < 0.3
            now = np.where(anew, rng.random(truth.shape) < chance, last & ~(truth & last & (
                rng.random(truth.shape) < loss / FOUND)))  # fmt: skip
            for name, old in (("last", last), ("pinned", first)):
                tests = {n: partial(f1_is_worse, truth[n], old[n], now[n])
                         for n in range(ADAPTERS)}  # fmt: skip
                noticed[name] |= any(holm(tests, bool).values())
            last = now
        for name, seen in noticed.items():
            counts[name] += seen
    return {name: count / runs for name, count in counts.items()}


def main() -> None:
    results: dict[str, Any] = {
        "command": "python benchmarks/verdict/retrained.py",
        "adapters": ADAPTERS, "rows": ROWS, "questions": QUESTIONS,
        "unchanged_flagged": {
            f"{redrawn:.0%} of answers redrawn": flagged(redrawn, 600)
            for redrawn in (0.1, 0.3, 1.0)
        },
        "unchanged_gates_listed_as_failing": {
            name: gates_turned(*shares, 100) for name, shares in LIMITS.items()
        },
        "one_of_five_lost_flagged": {
            f"recall {0.3 * lost:.2f} lower, 30% redrawn": flagged(0.3, 200, lost)
            for lost in (0.1, 0.2, 0.3)
        },
        "creeping_loss_noticed": creeping(60),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
