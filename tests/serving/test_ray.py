"""The application on Ray Serve: its arguments, and a cluster of two workers."""

import http.client
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.served import EIGHT, KEY, make_served, serving

from lora_domains.errors import AdapterError, UsageError
from lora_domains.serving import network
from lora_domains.serving.network import Cluster, ray_application

COUNTED = re.compile(r'requests_total\{domain="d\d",endpoint="/v1/completions".*\} (\S+)')
CREATED = re.compile(r'requests_created\{domain="d\d",endpoint="/v1/completions".*\} (\S+)')


def test_the_arguments_are_those_of_serve_run() -> None:
    read = Cluster.read({"adapters": "a,b", "replicas": "3", "gpus": "0.5"})
    assert read == Cluster("a,b", replicas=3, gpus=0.5)
    wrong = ({}, {"adapters": "a", "replicas": "many"}, {"adapters": "a", "port": "1"},
             {"adapters": "a", "rows": "0"}, {"adapters": "a", "cpus": "nan"})  # fmt: skip
    for arguments in wrong:
        with pytest.raises(UsageError, match="adapters=FOLDER"):
            Cluster.read(arguments)


def test_bad_input_is_refused_before_a_cluster_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.serve")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="an adapter folder"):
        ray_application({"adapters": "adapters/medical"})
    monkeypatch.setattr("lora_domains.errors.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'lora-domains[ray]'")):
        ray_application({"adapters": "adapters/medical"})


# ── A cluster ───────────────────────────────────────────────────────────────────────────────────

PROMPTS = [f"{word} river {n}" for word in ("red", "blue") for n in range(3)]


@dataclass
class Workers:
    """The workers behind a port."""

    port: int

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body), KEY)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def complete(self, model: str, prompt: str, most: int = 8) -> tuple[int, str]:
        body = {"model": model, "prompt": prompt, "max_tokens": most}
        status, text = self.send("POST", "/v1/completions", body)
        return status, json.loads(text)["choices"][0]["text"] if status == 200 else text

    @property
    def processes(self) -> set[int]:
        """The ids of the workers that answer."""
        found = set()
        for one in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if one.cmdline()[0].startswith("ray::ServeReplica"):
                    found.add(one.pid)
        return found

    def seen(self) -> Counter[str]:
        """Completions by the worker that answered them, as far as asking for them shows.

        A worker is known by the time at which it answered its first one.
        """
        found: Counter[str] = Counter()
        for _ in range(30):
            text = self.send("GET", "/metrics")[1]
            if first := CREATED.search(text):
                found[first[1]] = sum(map(int, map(float, COUNTED.findall(text))))
        return found


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Two workers on a cluster of this machine, with the adapters d0 to d7 and spam."""
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    monkeypatch.setenv("LORA_DOMAINS_API_KEY", "secret")
    names = (*EIGHT, "spam")
    application = ray_application({
        "adapters": ",".join(str(tmp_path / "adapters" / name) for name in names),
        "base": str(tmp_path / "base"), "replicas": "2", "cpus": "0.5", "rows": "4", "queue": "8",
    })  # fmt: skip
    with network.listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application)
        yield Workers(port)
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def known(tmp_path: Path) -> dict[tuple[str, str], str]:
    """What a server without Ray answers."""
    with serving(make_served(tmp_path), EIGHT) as server:
        return {
            (name, prompt): server.complete(name, prompt, max_tokens=8)[1]["choices"][0]["text"]
            for name in EIGHT for prompt in PROMPTS
        }  # fmt: skip


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_two_workers_answer_eight_clients_and_one_is_replaced(
    known: dict[tuple[str, str], str], workers: Workers
) -> None:
    asked = list(known) * 4

    def ask(which: tuple[str, str]) -> tuple[tuple[str, str], int, str]:
        return (which, *workers.complete(*which))

    assert workers.send("POST", "/v1/adapters/reload")[0] == 403
    body = {"model": "spam", "input": ["red", "blue"]}
    assert len(json.loads(workers.send("POST", "/v1/classify", body)[1])["data"]) == 2
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, asked))
        assert answers == [(which, 200, known[which]) for which in asked]
        assert sum(workers.seen().values()) == len(asked)
        assert len(workers.seen()) == 2
        # What both have no room for is refused, and does not wait for ever.
        with ThreadPoolExecutor(48) as many:
            crowd = list(many.map(lambda _: workers.complete("d0", PROMPTS[0], 64)[0], range(48)))
        assert set(crowd) == {200, 429}
        # A worker is killed meanwhile: at most the requests that it had are lost.
        first, *others = before = workers.processes
        assert len(before) == 2
        running = clients.map(ask, asked)
        os.kill(first, signal.SIGKILL)
        answers = list(running)
    lost = [status for _, status, _ in answers if status != 200]
    assert len(lost) <= 8
    assert all(status >= 500 for status in lost)
    assert all(text == known[which] for which, status, text in answers if status == 200)
    end = time.monotonic() + 60
    while len(workers.processes - {first}) < 2 or len(workers.seen()) < 2:
        assert time.monotonic() < end, "no other worker took its place"
        workers.complete(*asked[0])
    assert set(others) < workers.processes
