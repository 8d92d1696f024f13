"""What a server allows, what it serves and reads again, and what it counts.

Counts are in the text format of Prometheus and hold no text of any row.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_domains.adapters.folder import CONFIG, WEIGHTS
from lora_domains.adapters.loading import load_adapter
from lora_domains.atomic import restored
from lora_domains.errors import LoraDomainsError
from lora_domains.report.card import CARD
from lora_domains.serving.requests import unknown_model

if TYPE_CHECKING:
    from lora_domains.serving.scheduler import Scheduler

# ── What is served ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:
    """What a server allows; seconds and bytes."""

    keys: tuple[str, ...] = ()
    body: int = 1 << 20
    timeout: float = 600.0
    """Of a request, from its arrival to the end of its answer."""
    idle: float = 20.0
    """Of a client that sends or reads nothing."""


@dataclass
class Service:
    """What the endpoints share."""

    scheduler: "Scheduler"
    folders: "Folders"
    base_name: str
    settings: Settings = field(default_factory=Settings)
    log: Callable[[str], None] = lambda _line: None
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """The models that can be named, the base last."""
        return [*self.scheduler.bank, self.base_name]

    def listed(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's shape."""
        parent = {} if name == self.base_name else {"parent": self.base_name}
        return {"id": name, "object": "model", "created": self.started,
                "owned_by": "lora_domains", **parent}  # fmt: skip

    def domain(self, name: str) -> str | None:
        """The adapter called ``name``, None for the base; raises ApiError for an unknown one."""
        if name in self.scheduler.bank:
            return name
        if name == self.base_name:
            return None
        raise unknown_model(name, self.names)


class Folders:
    """The folders of the served adapters, to read again those that were trained again."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._read = {name: _state(folder) for name, folder in folders.items()}
        self._lock = threading.Lock()

    def reload(self, scheduler: "Scheduler") -> list[dict[str, str]]:
        """Put the adapters that changed in place; what cannot be read stays as it was.

        Requests that run end on the adapter that they began with.
        """
        with self._lock:
            return [self._reload(name, folder, scheduler) for name, folder in self._folders.items()]

    def _reload(self, name: str, folder: Path, scheduler: "Scheduler") -> dict[str, str]:
        result = {"id": name, "status": "unchanged"}
        try:
            state = _state(folder)
            if state != self._read[name]:
                adapter = load_adapter(folder, scheduler.bank.base, name)
                scheduler.swap(adapter).result()
                self._read[name] = state
                result["status"] = "reloaded"
        except (LoraDomainsError, OSError, RuntimeError) as error:
            shown = str(error) if isinstance(error, LoraDomainsError) else type(error).__name__
            result |= {"status": "failed", "error": shown}
        scheduler.metrics.add_reload(name, result["status"])
        return result


def _state(folder: Path) -> str:
    """A digest of the files that decide what an adapter answers."""
    digest = sha256()
    for name in (CONFIG, WEIGHTS, CARD):
        path = restored(folder) / name
        digest.update(path.read_bytes() if path.exists() else b"-")
    return digest.hexdigest()


# ── Counts ──────────────────────────────────────────────────────────────────────────────────────


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the buckets of durations."""
BASE = "(base)"
"""The label of requests without an adapter. No domain can have this name."""
Labels = tuple[tuple[str, str], ...]


class _Histogram:
    """Durations, counted in buckets."""

    def __init__(self) -> None:
        self.buckets = [0] * len(SECONDS)
        self.sum, self.count = 0.0, 0

    def add(self, seconds: float) -> None:
        self.sum, self.count = self.sum + seconds, self.count + 1
        for place, bound in enumerate(SECONDS):
            self.buckets[place] += seconds <= bound


class Metrics:
    """What a server counts; safe across threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[Labels] = Counter()
        self._tokens: Counter[Labels] = Counter()
        self._reloads: Counter[Labels] = Counter()
        self._durations: dict[Labels, _Histogram] = {}
        self._first: dict[Labels, _Histogram] = {}
        self._steps = self._step_rows = 0
        self._waiting = self._running = 0

    def add_request(
        self, endpoint: str, domain: str | None, status: int, seconds: float,
        first: float | None = None,
    ) -> None:  # fmt: skip
        """A request that ended; ``first`` are the seconds to the first piece of its answer.

        ``domain`` is a known one, or "" where a request names none.
        """
        of = (("domain", BASE if domain is None else domain), ("endpoint", endpoint))
        with self._lock:
            self._requests[(*of, ("status", str(status)))] += 1
            self._durations.setdefault(of, _Histogram()).add(seconds)
            if first is not None:
                self._first.setdefault(of, _Histogram()).add(first)

    def add_tokens(self, domain: str | None, kind: str, count: int) -> None:
        """Tokens that were read (``prompt``) or generated (``completion``)."""
        with self._lock:
            self._tokens[(("domain", domain or BASE), ("kind", kind))] += count

    def add_reload(self, domain: str, result: str) -> None:
        with self._lock:
            self._reloads[(("domain", domain), ("result", result))] += 1

    def add_step(self, rows: int) -> None:
        """A step in which ``rows`` answers were decoded together."""
        with self._lock:
            self._steps, self._step_rows = self._steps + 1, self._step_rows + rows

    def set_load(self, waiting: int, running: int) -> None:
        self._waiting, self._running = waiting, running

    def text(self) -> str:
        """The format of Prometheus, version 0.0.4."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _counter("requests_total", "Requests that ended.", self._requests)
        yield from _counter("tokens_total", "Tokens read and generated.", self._tokens)
        yield from _counter("reloads_total", "Adapters read again.", self._reloads)
        for name, what, found in (
            ("request_seconds", "Seconds of a request.", self._durations),
            ("first_token_seconds", "Seconds to the first text of an answer.", self._first),
        ):
            yield from _histogram(name, what, found)
        for name, kind, what, value in (
            ("steps_total", "counter", "Steps of decoding.", self._steps),
            ("step_rows_total", "counter", "Answers decoded, over all steps.", self._step_rows),
            ("queue_requests", "gauge", "Requests that wait.", self._waiting),
            ("running_answers", "gauge", "Answers that are being decoded.", self._running),
        ):
            yield from _head(name, kind, what)
            yield _line(name, (), value)


def _head(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP lora_domains_{name} {what}", f"# TYPE lora_domains_{name} {kind}"


def _counter(name: str, what: str, values: Mapping[Labels, int]) -> Iterator[str]:
    yield from _head(name, "counter", what)
    yield from (_line(name, labels, value) for labels, value in sorted(values.items()))


def _histogram(name: str, what: str, found: Mapping[Labels, _Histogram]) -> Iterator[str]:
    yield from _head(name, "histogram", what)
    for labels, one in sorted(found.items()):
        for bound, count in zip(SECONDS, one.buckets, strict=True):
            yield _line(f"{name}_bucket", (*labels, ("le", f"{bound:g}")), count)
        yield _line(f"{name}_bucket", (*labels, ("le", "+Inf")), one.count)
        yield _line(f"{name}_sum", labels, one.sum)
        yield _line(f"{name}_count", labels, one.count)


def _line(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"lora_domains_{name}{'{' + inside + '}' if inside else ''} {value:.10g}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
