"""How long the phases of a run take, and how long they will take."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

HEAD, STEPS, GENERAL = "head", "steps", "general_text"
VALIDATION, EVALUATION = "validation", "evaluation"
"""The phases of a run: the probe from which a head starts, optimiser steps, the base's predictions
on general text, the validation of an epoch, and the evaluation of the trained adapter."""
ENOUGH = 1.0
"""Seconds that a part of some work must take to say how long all of it takes."""
FIRST = 2
"""Items of the first part that is timed."""


class Clock:
    """Seconds of each phase, in ``seconds``. A phase inside another stops the outer one."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        """Credit the time since the last change of phase to the innermost one."""
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def phases_in_words(seconds: dict[str, float]) -> str:
    """``steps 6 min 2 s, general text 41 s``: the phases that took any time."""
    phases = {name: format_duration(value) for name, value in seconds.items() if value >= 0.5}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in phases.items())


def estimated_phases(
    items: Sequence[T], run: Callable[[list[T], Clock], object],
    size: Callable[[Sequence[T]], float], first: int = FIRST,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each phase that ``run`` would take for all ``items``, from parts of them.

    ``run`` is called with a part and the clock that it keeps. Parts are spread over ``items`` and
    doubled from ``first`` of them until one takes ``ENOUGH``; ``size`` of a part is what its time
    is proportional to.
    """
    count = first
    while items:
        part, clock = spread(items, count), Clock({})
        run(part, clock)
        if len(part) == len(items) or sum(clock.seconds.values()) >= ENOUGH:
            share = size(part) / max(1.0, size(items))
            return {name: seconds / max(share, 1e-9) for name, seconds in clock.seconds.items()}
        count *= 2
    return {}


def spread(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` at most, at equal distances."""
    if count >= len(items):
        return list(items)
    return [items[(2 * at + 1) * len(items) // (2 * count)] for at in range(count)]


def format_duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
