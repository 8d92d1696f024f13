"""The address at which a server of this package listens."""

import errno
import socket

from lora_domains.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only programs on this machine reach."""


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
