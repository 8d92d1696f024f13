"""Addresses: what cannot be listened on is refused before a base is loaded."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import run

from lora_domains.errors import UsageError
from lora_domains.serving.network import listening, url


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        yield bound.getsockname()[1]


def test_a_free_port_is_listened_on() -> None:
    with listening("127.0.0.1", 0) as bound:
        address = url("127.0.0.1", bound)
        assert address == f"http://127.0.0.1:{bound.getsockname()[1]}"
        with socket.create_connection(bound.getsockname()):
            pass


def test_everyones_address_is_opened_at_this_machine() -> None:
    with listening("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url("0.0.0.0", bound) == f"http://127.0.0.1:{port}"
        assert url("::", bound) == f"http://[::1]:{port}"
        assert url("::1", bound) == f"http://[::1]:{port}"


def test_a_port_in_use_is_named(taken: int) -> None:
    with pytest.raises(UsageError, match="another program listens there") as raised:
        listening("127.0.0.1", taken)
    assert f"--port {taken + 1}" in raised.value.hint


@pytest.mark.parametrize(
    ("host", "port", "found"),
    [("127.0.0.1", 70000, "70000"), ("127.0.0.1", -1, "-1"), ("192.0.2.1", 0, "assign")],
)
def test_what_is_no_address_is_refused(host: str, port: int, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        listening(host, port)


def test_the_port_is_tried_before_a_base_is_loaded(
    taken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.folders import folder

    folder(tmp_path / "adapters")
    flags = ["--out", str(tmp_path / "adapters"), "--base", "no/such-base"]
    assert run("playground", *flags, "--port", str(taken)) == 2
    assert "another program listens there" in capsys.readouterr().err
