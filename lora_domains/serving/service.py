"""What a server allows, what it serves and reads again, and what it counts.

Counts are metrics of Prometheus and hold no text of any row.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lora_domains.adapters.folder import CONFIG, WEIGHTS
from lora_domains.adapters.loading import load_adapter
from lora_domains.atomic import restored
from lora_domains.errors import LoraDomainsError, UsageError
from lora_domains.report.card import CARD
from lora_domains.serving.requests import ApiError, unknown_model

if TYPE_CHECKING:
    from lora_domains.model import DomainModel
    from lora_domains.serving.scheduler import Scheduler

# ── What is served ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:
    """What a server allows; seconds and bytes."""

    keys: tuple[str, ...] = ()
    rows: int = 16
    """Answers that are decoded together."""
    queue: int = 64
    """Requests that wait."""
    max_tokens: int = 1024
    """Of an answer."""
    body: int = 1 << 20
    timeout: float = 600.0
    """Of a request, from its arrival to the end of its answer."""
    idle: float = 20.0
    """Of a client that sends or reads nothing."""


@dataclass
class Service:
    """What the endpoints share."""

    scheduler: "Scheduler"
    folders: "Folders | None"
    """None for one of several replicas, which are replaced rather than read again."""
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

    def reload(self) -> list[dict[str, str]]:
        """Put the adapters that changed in place, and say so of each."""
        return [] if self.folders is None else self.folders.reload(self.scheduler)


def make_service(
    model: "DomainModel", folders: Mapping[str, Path], settings: Settings,
    log: Callable[[str], None] = lambda _line: None, *, replica: bool = False,
) -> Service:  # fmt: skip
    """Load the adapters in ``folders`` by their names and serve them on the base of ``model``.

    Raises UsageError for an adapter that is called as the base, and what loading one raises.
    """
    from lora_domains.serving.scheduler import Scheduler

    base = model.base.id
    name = Path(base).name if Path(base).exists() else base
    if name in folders:
        raise UsageError(
            where=name,
            expected="adapters with other names than their base",
            found=f"both called {name!r}",
            hint="Rename the folder of the adapter.",
        )
    for domain, folder in folders.items():
        model.load_adapter(folder, domain)
    scheduler = Scheduler(
        model.bank, Metrics(), rows=settings.rows, queue=settings.queue,
        max_tokens=settings.max_tokens,
    )  # fmt: skip
    return Service(scheduler, None if replica else Folders(folders), name, settings, log)


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
        except (ApiError, LoraDomainsError, OSError, RuntimeError) as error:
            told = isinstance(error, ApiError | LoraDomainsError)
            shown = str(error) if told else type(error).__name__
            result |= {"status": "failed", "error": shown}
        scheduler.metrics.reloads.labels(name, result["status"]).inc()
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


class Metrics:
    """What a server counts, in a registry of its own; safe across threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"namespace": "lora_domains", "registry": self.registry}
        each = ("domain", "endpoint")
        self._requests = Counter("requests", "Requests that ended.", (*each, "status"), **of)
        self._seconds = Histogram(
            "request_seconds", "Seconds of a request.", each, buckets=SECONDS, **of
        )
        self._first = Histogram(
            "first_token_seconds", "Seconds to the first text of an answer.", each,
            buckets=SECONDS, **of,
        )  # fmt: skip
        self._tokens = Counter("tokens", "Tokens read and generated.", ("domain", "kind"), **of)
        self.reloads = Counter("reloads", "Adapters read again.", ("domain", "result"), **of)
        self.steps = Counter("steps", "Steps of decoding.", **of)
        self.step_rows = Counter("step_rows", "Answers decoded, over all steps.", **of)
        self.waiting = Gauge("queue_requests", "Requests that wait.", **of)
        self.running = Gauge("running_answers", "Answers that are being decoded.", **of)

    def add_request(
        self, endpoint: str, domain: str | None, status: int, seconds: float,
        first: float | None = None,
    ) -> None:  # fmt: skip
        """A request that ended; ``first`` are the seconds to the first piece of its answer.

        ``domain`` is a known one, or "" where a request names none.
        """
        name = BASE if domain is None else domain
        self._requests.labels(name, endpoint, status).inc()
        self._seconds.labels(name, endpoint).observe(seconds)
        if first is not None:
            self._first.labels(name, endpoint).observe(first)

    def add_tokens(self, domain: str | None, kind: str, count: int) -> None:
        """Tokens that were read (``prompt``) or generated (``completion``)."""
        self._tokens.labels(domain or BASE, kind).inc(count)
