"""The address at which a server of this package listens, and what runs the application: Uvicorn,
or replicas of Ray Serve."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import check_one_base, folders_by_name
from lora_domains.errors import UsageError, check_installed, listed

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only programs on this machine reach."""
KEY = "LORA_DOMAINS_API_KEY"
"""The environment variable of a server's key."""
KEPT = 5
"""Seconds that a connection without a request is kept open after an answer."""


# ── Uvicorn ─────────────────────────────────────────────────────────────────────────────────────


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``; port 0 is any free one.

    Bound before a base is loaded, so that nobody waits for that in vain. Raises UsageError for a
    port in use, one that needs other rights, or a host that is not one of this machine.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port <= 65535:
        raise UsageError(
            where=where,
            expected="a port from 0 to 65535",
            found=str(port),
            hint="Ports from 1024 need no special rights.",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            expected, found = "a free port", "another program listens there"
            hint = f"Choose another, such as --port {port + 1 if port < 65535 else 0}."
        elif error.errno == errno.EACCES:
            expected, found = "a port that may be opened", "no permission"
            hint = "Ports below 1024 belong to the administrator: choose --port 8000."
        else:
            expected, found = "an address of this machine", error.strerror or str(error)
            hint = "127.0.0.1 is reached from this machine only, 0.0.0.0 from the network."
        raise UsageError(where=where, expected=expected, found=found, hint=hint) from None


def url(host: str, bound: socket.socket) -> str:
    """The address to open in a browser."""
    name = "127.0.0.1" if host in ("", "0.0.0.0") else "[::1]" if host == "::" else host
    shown = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"http://{shown}:{bound.getsockname()[1]}"


def run(app: Any, bound: socket.socket, *, idle: float, grace: float,
        on_hangup: Callable[[], None] | None = None) -> None:  # fmt: skip
    """Run the ``server`` of an application until SIGTERM or SIGINT.

    ``on_hangup`` is called in a thread at SIGHUP.
    """

    async def serve() -> None:
        if on_hangup is not None and hasattr(signal, "SIGHUP"):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, loop.run_in_executor, None, on_hangup)
        await server(app, idle=idle, grace=grace).serve(sockets=[bound])

    asyncio.run(serve())


def server(app: Any, *, idle: float, grace: float) -> Any:
    """A server of Uvicorn.

    When it stops, answers in progress have ``grace`` seconds to end. A client that sends no request
    within ``idle`` seconds, or reads nothing for as long, is cut off.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Stops at a signal without raising it again: a stop that was asked for is no failure."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            self._captured_signals.clear()

    return Server(uvicorn.Config(
        app, http=_protocol(idle), ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEPT,
        timeout_graceful_shutdown=max(1, round(grace)),
    ))  # fmt: skip


def _protocol(idle: float) -> Any:
    """HTTP/1.1 as Uvicorn speaks it, without clients that do nothing for ``idle`` seconds."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Ends the connection of a client that is too slow."""

        _waiting: asyncio.TimerHandle | None = None
        _sending: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._waiting = self.loop.call_later(idle, self._cut_off, True)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._waiting, self._sending):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._sending = self.loop.call_later(idle, self._cut_off, False)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._sending is not None:
                self._sending.cancel()

        def on_response_complete(self) -> None:
            last = self.cycle
            super().on_response_complete()
            if self._waiting is not None:
                self._waiting.cancel()
            # Uvicorn ends a silent connection after ``KEPT``, but waits for a request once begun.
            self._waiting = self.loop.call_later(idle + KEPT, self._cut_off, True, last)

        def _cut_off(self, unasked: bool, last: object = None) -> None:
            """End the connection, if ``unasked`` only where no request followed ``last``."""
            if not unasked or self.cycle is last:
                self.transport.abort()

    return Protocol


# ── Ray Serve ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cluster:
    """The arguments of ``ray_application``; CPUs and GPUs are those of one replica."""

    adapters: str = ""
    """Folders, with commas between them."""
    base: str = ""
    """A folder or an id of the Hub; by default the base of the first adapter."""
    replicas: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    rows: int = 16
    queue: int = 64
    max_tokens: int = 1024

    @classmethod
    def read(cls, arguments: Mapping[str, str]) -> "Cluster":
        """From the texts of ``serve run``; raises UsageError for an argument that is wrong."""
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        try:
            found = cls(**{name: kinds[name](value) for name, value in arguments.items()})
        except (KeyError, TypeError, ValueError):
            found = cls()
        numbers = (found.replicas, found.rows, found.queue, found.max_tokens, found.cpus)
        usable = all(number > 0 for number in numbers) and found.gpus >= 0
        if not usable or not (found.adapters or found.base):
            given = " ".join(f"{name}={value}" for name, value in arguments.items())
            raise UsageError(
                where="ray_application",
                expected=f"adapters=FOLDER,FOLDER, and perhaps others of {listed(list(kinds), 9)}",
                found=given or "nothing",
                hint="For example adapters=adapters/medical,adapters/legal replicas=2",
            )
        return found


def ray_application(arguments: Mapping[str, str]) -> Any:
    """The application of ``serve`` on Ray Serve, for ``serve run`` and ``ray.serve.run``.

    Each of its replicas, processes on one machine or several, has the base and all adapters.
    ``arguments`` are those of ``Cluster``. Raises UsageError for others, and AdapterError for
    adapters that are not found, before anything starts.
    """
    cluster = Cluster.read(arguments)
    libraries = ("ray", "starlette", "prometheus_client")
    check_installed("ray_application", "Ray Serve", "ray", libraries)
    names = [name for name in cluster.adapters.split(",") if name.strip()]
    found = folders_by_name([name.strip() for name in names], Path("adapters"))
    check_one_base(found.values(), "ray_application",
                   lambda ours: f"adapters={','.join(map(str, ours))}")  # fmt: skip
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before a cluster is started here
    from ray import serve

    folders = {name: folder.absolute() for name, folder in found.items()}
    base = str(Path(cluster.base).absolute()) if Path(cluster.base).is_dir() else cluster.base
    keys = tuple(filter(None, [os.environ.get(KEY)]))

    def replica() -> Any:
        return _replica(cluster, base, folders, keys)

    class Replica:
        """A process with the base and all adapters."""

        app: Any
        """What ``replica()`` returned, set by Ray Serve."""

        def check_health(self) -> None:
            if not self.app.state.service.scheduler.alive:
                raise RuntimeError("the scheduler ended")

    deployed = serve.deployment(
        name="lora_domains", num_replicas=cluster.replicas,
        # More than it answers: it refuses others at once (429), where Ray would let them wait for
        # ever, and says meanwhile that it lives.
        max_ongoing_requests=2 * (cluster.rows + cluster.queue),
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    )  # fmt: skip
    return deployed(serve.ingress(replica)(Replica)).bind()


def _replica(
    cluster: Cluster, base: str, folders: Mapping[str, Path], keys: tuple[str, ...]
) -> Any:
    """The application in one process of a cluster."""
    from lora_domains.analysis.reproduce import base_named_by
    from lora_domains.console import Display
    from lora_domains.model import DomainModel
    from lora_domains.serving.app import make_app
    from lora_domains.serving.service import Settings, make_service

    first = next(iter(folders.values()), None)
    path, revision = (base, None) if base or first is None else base_named_by(first)
    model = DomainModel.from_pretrained(path, revision=revision, display=Display(quiet=True))
    settings = Settings(keys, cluster.rows, cluster.queue, cluster.max_tokens)
    return make_app(make_service(model, folders, settings, replica=True))
