"""The verb serve: what it refuses before a base is loaded, and a process with its signals."""

import http.client
import json
import os
import re
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.commands import Forked, fork, run
from support.served import make_served, request_bytes

from lora_domains.adapters.folder import folders_by_name
from lora_domains.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("served"))


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert run("serve", *flags) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_served_is_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("lora_domains.cli.verbs.serving.open_model", lambda *_, **__: 1 / 0)
    d0, base = str(folder / "adapters" / "d0"), ("--base", str(folder / "base"))
    assert "or a base to serve alone found neither" in refused(capsys)
    assert "no adapter folder among" in refused(
        capsys, str(folder / "base"), str(folder / "base" / "config.json")
    )
    assert "the name of one in" in refused(capsys, "nobody", *base)
    other = tmp_path / "d0"
    other.mkdir()
    for path in Path(d0).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert "two called 'd0'" in refused(capsys, d0, str(other), *base)
    for flag in ("--rows", "--queue", "--max-tokens", "--max-body", "--timeout", "--idle"):
        assert "a number above 0" in refused(capsys, d0, flag, "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "a free port" in refused(capsys, d0, "--port", str(taken.getsockname()[1]))
    empty = tmp_path / "keys"
    empty.write_text("\n  \n", encoding="utf-8-sig")  # as Windows writes it
    assert "found an empty one" in refused(capsys, d0, "--api-key-file", str(empty))
    assert "a readable file" in refused(capsys, d0, "--api-key-file", str(tmp_path / "none"))
    assert "found other characters" in refused(capsys, d0, "--api-key", "schlüssel")
    monkeypatch.setattr("lora_domains.errors.find_spec", lambda _name: None)
    assert "hint pip install 'lora-domains[serve]'" in refused(capsys, d0)


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_out_the_line_of_each_request(
    quiet: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_domains.serving.app.make_app", lambda service: service)
    monkeypatch.setattr(
        "lora_domains.serving.network.run",
        lambda service, *_, **__: service.log("200 /v1/models 0.001 s"),
    )
    base = ("--base", str(folder / "base"), "--port", "0")
    assert run("serve", *base, *["--quiet"] * quiet) == 0
    shown = capsys.readouterr().err
    assert "Serving base at http://" in shown
    assert ("200 /v1/models" in shown) is not quiet


def test_adapters_are_served_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, cached = Path("adapters"), Path("models--team--notes.v2", "snapshots", "3" * 40)
    for folder in (out / "triage", out / "legal", cached):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    known = {name: out / name for name in ("legal", "triage")}
    (out / "notes.txt").write_text("", encoding="utf-8")
    # A shell of Windows leaves the * to us, others name all that is there.
    assert folders_by_name(["adapters/*"], out) == known
    assert folders_by_name([str(path) for path in out.iterdir()], out) == known
    # What is called like an adapter, but is none, does not stand in the way of its name.
    Path("triage").mkdir()
    assert folders_by_name(["legal", "triage"], out) == known
    # In the Hub's cache, a folder is called after its commit.
    assert folders_by_name([str(cached)], out) == {"notes-v2": cached}


def test_a_base_that_is_called_as_an_adapter_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "base"
    other.mkdir()
    for path in (folder / "adapters" / "d0").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    where = ("--base", str(folder / "base"), "--port", "0")
    assert "adapters with other names than their base" in refused(capsys, str(other), *where)


def told(served: Forked, pattern: str) -> re.Match[str]:
    """``pattern`` in what the process says on its standard error, once it is there."""
    until = time.monotonic() + 120
    while (found := re.search(pattern, served.errors())) is None:
        assert time.monotonic() < until, served.errors()
        time.sleep(0.05)
    return found


def ask(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    key = {"Authorization": "Bearer secret"}
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, key)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of Unix")
def test_a_process_serves_until_sigterm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DOMAINS_API_KEY", "secret")
    base = str(folder / "base")
    words = ["serve", "adapters/*", base, "--base", base, "--port", "0", "--max-tokens", "400"]
    served = fork(lambda: cli.main(words), folder)
    try:
        found = told(served, r"at http://127\.0\.0\.1:(\d+)/v1")
        port = int(found[1])
        while True:
            try:
                assert ask(port, "/ready")[1]["models"][:2] == ["d0", "d1"]
                break
            except ConnectionError:
                continue
        wanted = ask(port, "/v1/completions", {"model": "d1", "prompt": "red", "max_tokens": 350})
        os.kill(served.number, signal.SIGHUP)
        told(served, "d7: unchanged")
        # An answer in progress is finished before the process ends.
        body = {"model": "d1", "prompt": "red", "max_tokens": 350, "stream": True}
        data = request_bytes("/v1/completions", body)
        data = data.replace(b"\r\n", b"\r\nAuthorization: Bearer secret\r\n", 1)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(data)
            text = connection.recv(1024)
            os.kill(served.number, signal.SIGTERM)
            while part := connection.recv(1 << 16):
                text += part
        assert b"[DONE]" in text
        events = re.findall(r"^data: (\{.*)$", text.decode(), re.M)
        assert (
            "".join(json.loads(event)["choices"][0]["text"] for event in events)
            == (wanted[1]["choices"][0]["text"])
        )
        assert served.ended()[0] == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(served.number, signal.SIGKILL)
