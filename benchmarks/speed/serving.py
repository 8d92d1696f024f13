"""What a server answers to several clients at once, over one request after another.

    python benchmarks/speed/serving.py                           # about 4 minutes on 2 cores
    python benchmarks/speed/serving.py --device cuda --dtype bfloat16

Requests of eight domains, a prompt of 16 tokens and an answer of 16, over HTTP on this machine. One
client sends them one by one, eight clients at once; in Python, ``generate`` answers them one by one
without a server. Answers of all three must be the same, to the token, in float32.
"""

import asyncio
import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from measure import Experiment, ratios
from shape import bench

from lora_domains import DomainModel
from lora_domains.serving import network
from lora_domains.serving.app import make_app
from lora_domains.serving.scheduler import Scheduler
from lora_domains.serving.service import Metrics, Service

DOMAINS, CLIENTS, PROMPT, NEW = 8, 8, 16, 16
GOAL = 2.0
Request = tuple[str, str]


@contextmanager
def served(model: DomainModel) -> Iterator[int]:
    """The port of a server of ``model``, which runs in this process."""
    service = Service(Scheduler(model.bank, Metrics()), None, "base")
    with network.listening("127.0.0.1", 0) as bound:
        server = network.server(make_app(service), idle=600.0, grace=5.0)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Clients:
    """Sends requests, and keeps the answers and the seconds of each."""

    def __init__(self, port: int, requests: Sequence[Request]) -> None:
        self.port, self.requests = port, requests
        self.answers: dict[int, str] = {}
        self.seconds: dict[int, list[float]] = {}

    def send(self, clients: int) -> None:
        """All requests, divided between ``clients`` that each wait for their answers."""
        self.seconds.setdefault(clients, [])
        self.answers = {}  # those of the last turn must not hide that one is missing
        threads = [threading.Thread(target=self._send, args=(clients, n)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, clients: int, first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        for number in range(first, len(self.requests), clients):
            domain, prompt = self.requests[number]
            body = {"model": domain, "prompt": prompt, "max_tokens": NEW}
            started = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = json.loads(connection.getresponse().read())
            self.seconds[clients].append(time.perf_counter() - started)
            self.answers[number] = answer["choices"][0]["text"]
        connection.close()


def main() -> None:
    experiment = Experiment("serving", __doc__)
    with bench(experiment) as test:
        model = test.ours(test.adapters(DOMAINS))
        count = 16
        prompts = test.prompts(count, PROMPT)
        requests = [(f"d{n % DOMAINS}", prompt) for n, prompt in enumerate(prompts)]
        alone: dict[int, str] = {}

        def in_python() -> None:
            for n, (domain, prompt) in enumerate(requests):
                alone[n] = str(model.generate(prompt, domain, max_new_tokens=NEW))

        def same(answers: dict[int, str]) -> float:
            return sum(answers[n] == alone[n] for n in range(count)) / count

        in_python()
        with served(model) as port:
            clients = Clients(port, requests)
            works = {"in Python": in_python}
            works |= {f"{n} at once": partial(clients.send, n) for n in (1, CLIENTS)}
            shares = []
            runs = experiment.turns(works, per=count, after={
                f"{n} at once": lambda: shares.append(same(clients.answers)) for n in (1, CLIENTS)
            })  # fmt: skip
        experiment.figure("share of answers that are those of generate, alone", "", min(shares),
                          at_least=1.0 if experiment.dtype == "float32" else None)  # fmt: skip
        one, many = runs["1 at once"], runs[f"{CLIENTS} at once"]
        for name, seconds in (
            ("generate in Python, one by one", runs["in Python"]),
            ("served, 1 client", one),
            (f"served, {CLIENTS} clients", many),
        ):
            experiment.figure(f"requests a second, {name}", "/s", [1 / s for s in seconds],
                              better="more")  # fmt: skip
        experiment.figure(f"requests a second, {CLIENTS} clients over 1", "×", ratios(one, many),
                          at_least=GOAL)  # fmt: skip
        for n in (1, CLIENTS):
            twentieths = statistics.quantiles(clients.seconds[n], n=20)
            what = f"{n} client{'s' * (n > 1)}"
            experiment.figure(f"latency, median, {what}", "ms", twentieths[9])
            experiment.figure(f"latency, 95 %, {what}", "ms", twentieths[18])
        experiment.save(test.settings | {"requests": count, "domains": DOMAINS, "prompt": PROMPT,
                                         "new_tokens": NEW, "clients": CLIENTS})  # fmt: skip


if __name__ == "__main__":
    main()
