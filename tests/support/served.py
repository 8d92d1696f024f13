"""Servers on a tiny base with adapters that have an effect, and clients of them."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conftest import make_base
from support.adapters import save, strong
from support.chat_templates import CHATML
from support.models import model_in

from lora_domains.adapters.peft import save_adapter
from lora_domains.model import DomainModel
from lora_domains.modeling.base import Base, load_base
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.serving import network
from lora_domains.serving.app import make_app
from lora_domains.serving.service import Service, Settings, make_service
from lora_domains.tasks import Chat, Classification, Generation, Task, task_record

EIGHT = tuple(f"d{n}" for n in range(8))
"""Adapters of plain PEFT."""
TASKS: dict[str, Task] = {
    "spam": Classification(labels=("ham", "spam")),
    "talk": Chat(max_new_tokens=9),
    "short": Generation(max_new_tokens=7),
}
"""Adapters with a card, by the task in it."""
KEY = {"Authorization": "Bearer secret"}


def make_served(folder: Path) -> Path:
    """A base with a chat template, and the adapters above, in ``folder``."""
    made = make_base(folder / "base", max_position_embeddings=512)
    (made / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML, encoding="utf-8")
    base = load_base(made, device="cpu")
    for seed, name in enumerate(EIGHT):
        save(folder / "adapters" / name, strong(base, name, seed), base)
        (folder / "adapters" / name / "card.json").unlink()
    for seed, (name, task) in enumerate(TASKS.items(), 100):
        save_task(folder / "adapters" / name, base, task, seed)
    return folder


def save_task(folder: Path, base: Base, task: Task, seed: int) -> None:
    """A random adapter with a card that holds ``task``."""

    def card(sha256: str) -> Card:
        entry = AdapterEntry(
            domain=folder.name, path=folder.name, sha256=sha256,
            settings={"task": task_record(task)},
        )  # fmt: skip
        return Card(base=BaseRecord(**base.record()), adapter=entry)

    save_adapter(folder, strong(base, folder.name, seed), base, card, lambda _: "# An adapter\n")


@dataclass
class Server:
    """A running server, and the model behind it."""

    port: int
    model: DomainModel
    service: Service
    lines: list[str]

    def send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status and the JSON of an answer; ``body`` is sent as it is where it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read().decode()
            self.headers = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        kind = self.headers.get("content-type", "")
        return answer.status, json.loads(text) if kind == "application/json" else text

    def chat(self, model: str, text: str, **more: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": text}]
        return self.send("POST", "/v1/chat/completions",
                         {"model": model, "messages": messages, **more})  # fmt: skip

    def complete(self, model: str, prompt: Any, **more: Any) -> tuple[int, Any]:
        return self.send("POST", "/v1/completions", {"model": model, "prompt": prompt, **more})

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The JSON of each server-sent event; the last one must be [DONE]."""
        status, text = self.send("POST", path, {**body, "stream": True})
        assert status == 200, text
        parts = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert parts.pop() == "[DONE]"
        return [json.loads(part) for part in parts]

    def open(self, data: bytes = b"") -> socket.socket:
        """A connection on which ``data`` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def until(self, holds: Any, seconds: float = 20) -> None:
        """Wait until ``holds()``."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never held"
            time.sleep(0.01)


def request_bytes(path: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextmanager
def serving(
    folder: Path, names: tuple[str, ...] = (*EIGHT, *TASKS), settings: Settings | None = None,
    grace: float = 5.0, buffer: int | None = None, **limits: Any,
) -> Iterator[Server]:  # fmt: skip
    """A server of the adapters ``names`` on a free port of this process, until the block ends.

    ``buffer`` is the size of what the system sends without waiting for the client.
    """
    model = model_in(folder / "adapters", folder / "base")
    settings, lines = replace(settings or Settings(), **limits), list[str]()
    folders = {name: folder / "adapters" / name for name in names}
    service = make_service(model, folders, settings, lines.append)
    with network.listening("127.0.0.1", 0) as bound:
        if buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        server = network.server(make_app(service), idle=settings.idle, grace=grace)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Server(bound.getsockname()[1], model, service, lines)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
