"""Scored items as an evaluation leaves them, made up."""

import math
from typing import Any

Item = dict[str, Any]


def score(prediction: int, target: int, confidence: float = 0.9) -> dict[str, float]:
    """The score of one choice item, two tokens long."""
    right = prediction == target
    share = confidence if right else 1 - confidence
    return {
        "prediction": prediction, "confidence": confidence, "nll": -math.log(share),
        "brier": 2 * (1 - share) ** 2, "nats": 1.0, "tokens": 2,
    }  # fmt: skip


def row(target: int, where: str = "test", number: int = 0, **predicted: int) -> Item:
    """One choice item; ``predicted`` by each contender."""
    scores = {name: score(prediction, target) for name, prediction in predicted.items()}
    return {"set": where, "id": f"{where}:{number}", "digest": "", "target": target,
            "scores": scores}  # fmt: skip


def table(tp: int, fn: int, fp: int, tn: int, base: int = 0, where: str = "test") -> list[Item]:
    """Items in which the adapter has these counts and the base always predicts ``base``."""
    pairs = [(1, 1)] * tp + [(1, 0)] * fn + [(0, 1)] * fp + [(0, 0)] * tn
    return [row(t, where, n, base=base, adapter=p) for n, (t, p) in enumerate(pairs)]


def general(count: int = 400, lost: int = 0) -> list[Item]:
    """Probe items of two suites that the base answers correctly; the adapter misses ``lost``."""
    return [
        row(0, "general", n, base=0, adapter=1 if n < lost else 0) | {"suite": f"world/{n % 2}"}
        for n in range(count)
    ]


def text(count: int = 50, kl: float = 0.02) -> list[Item]:
    """General texts with this KL per token."""
    return [
        {"set": "text", "id": f"t:{n}", "target": -1, "suite": "world", "scores": {
            "base": {"nats": 30.0 + n % 3, "tokens": 10},
            "adapter": {"nats": 30.5 + n % 3, "tokens": 10, "kl": kl * 10},
        }}
        for n in range(count)
    ]  # fmt: skip


def train_like(tp: int, fn: int, fp: int, tn: int) -> list[Item]:
    """As ``table``, of training rows."""
    return table(tp, fn, fp, tn, where="train")
