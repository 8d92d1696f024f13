"""Many clients of many domains at once: no answer is another one's, whatever happens meanwhile."""

import contextlib
import http.client
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from support.adapters import save, strong
from support.served import EIGHT, KEY, Server, make_served, request_bytes, serving

from lora_domains.serving.service import Settings

PROMPTS = tuple(f"{word} {n} the red river" * (1 + n % 3) for n, word in enumerate(
    ("alpha", "beta", "gamma", "delta", "stone", "cloud")))  # fmt: skip
CLIENTS, TOKENS = 8, 8


@pytest.mark.parametrize(
    "requests",
    [pytest.param(120, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.long)],
)
def test_nothing_is_mixed_up(tmp_path: Path, requests: int) -> None:
    folder = make_served(tmp_path)
    settings = Settings(keys=("secret",), idle=1.0)
    with serving(folder, (*EIGHT, "spam"), settings, queue=200) as server:
        known = expected(server)
        # Each domain's answers are its own, or nothing could be seen to be mixed up.
        for prompt in PROMPTS:
            assert len({known[name, prompt][0] for name in EIGHT}) == len(EIGHT)
        retrained = strong(server.model.base, "d7", 99)
        server.model.bank.add(retrained)
        for prompt in PROMPTS:
            known["d7", prompt] += (str(alone(server, "d7", prompt)),)
        assert server.send("POST", "/v1/adapters/reload", headers=KEY)[0] == 200
        done = threading.Event()
        beside = [threading.Thread(target=work, args=(server, done)) for work in (hostile, leaving)]
        beside.append(threading.Thread(target=retrain, args=(server, folder, done)))
        wrong: list[Any] = []
        clients = [
            threading.Thread(target=ask, args=(server, known, n, requests // CLIENTS, wrong))
            for n in range(CLIENTS)
        ]
        for thread in (*beside, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        done.set()
        for thread in beside:
            thread.join()
        assert not wrong, wrong[:3]
        server.until(lambda: not server.service.scheduler._running)
        text = server.send("GET", "/metrics", headers=KEY)[1]
        reloads = 'lora_domains_reloads_total{domain="d7",result="reloaded"} '
        assert float(text.split(reloads)[1].split("\n")[0]) >= 2
        assert 'status="499"' in text
        steps, rows = (float(text.split(f"\nlora_domains_{name}_total ")[1].split("\n")[0])
                       for name in ("steps", "step_rows"))  # fmt: skip
        assert rows > 2 * steps  # they were answered together


def alone(server: Server, name: str, prompt: str) -> str:
    return str(server.model.generate(prompt, name, max_new_tokens=TOKENS))


def expected(server: Server) -> dict[tuple[str, str], tuple[str, ...]]:
    """What each domain answers to each prompt, one at a time and outside of the server."""
    known = {(name, p): (alone(server, name, p),) for name in EIGHT for p in PROMPTS}
    labels = server.model.predict(PROMPTS, "spam")
    return known | {("spam", p): (answer.label,)  # type: ignore[union-attr]
                    for p, answer in zip(PROMPTS, labels, strict=True)}  # fmt: skip


def ask(
    server: Server, known: dict[tuple[str, str], tuple[str, ...]], number: int, count: int,
    wrong: list[Any],
) -> None:  # fmt: skip
    """A client with one connection: completions, whole and streamed, and labels."""
    rng = random.Random(number)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for _ in range(count):
        name, prompt = rng.choice(list(known))
        if name == "spam":
            path, body = "/v1/classify", {"model": name, "input": prompt}
        else:
            path, body = "/v1/completions", {
                "model": name, "prompt": prompt, "max_tokens": TOKENS,
                "stream": rng.random() < 0.5}  # fmt: skip
        try:
            connection.request("POST", path, json.dumps(body), KEY)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                found = f"{answer.status} {text}"
            elif name == "spam":
                found = json.loads(text)["data"][0]["prediction"]
            elif body["stream"]:
                events = [part[6:] for part in text.split("\n\n") if part.startswith("data: {")]
                found = "".join(json.loads(event)["choices"][0]["text"] for event in events)
            else:
                found = json.loads(text)["choices"][0]["text"]
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            found = repr(error)
            connection.close()
        if found not in known[name, prompt]:
            wrong.append((name, prompt, found))
    connection.close()


def hostile(server: Server, done: threading.Event) -> None:
    """Half requests, nonsense, and connections on which nothing is sent."""
    rng, silent = random.Random(0), []
    body = request_bytes("/v1/completions", {"model": "d0", "prompt": "x" * 500})
    while not done.wait(0.02):
        data = rng.choice([b"", body[:40], body[:-5], b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n"])
        with contextlib.suppress(OSError):
            silent.append(server.open(data))
        if len(silent) > 30:
            silent.pop(rng.randrange(len(silent))).close()
    for connection in silent:
        connection.close()


def leaving(server: Server, done: threading.Event) -> None:
    """Clients that leave while their answer is streamed."""
    body = {"model": "d3", "prompt": "stone", "max_tokens": 400, "stream": True}
    data = request_bytes("/v1/completions", body)
    data = data.replace(b"\r\n", b"\r\nAuthorization: Bearer secret\r\n", 1)
    while not done.wait(0.1):
        with contextlib.suppress(OSError), server.open(data) as connection:
            connection.recv(300)


def retrain(server: Server, folder: Path, done: threading.Event) -> None:
    """``d7`` is trained again and again, and read again each time."""
    base, seed = server.model.base, 99
    while True:
        save(folder / "adapters" / "d7", strong(base, "d7", seed), base)
        assert server.send("POST", "/v1/adapters/reload", headers=KEY)[0] == 200
        seed = 106 - seed  # 99 and 7, the seed it was made with
        if done.wait(0.3):
            return
