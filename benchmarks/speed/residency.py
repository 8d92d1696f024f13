"""The memory of a loaded adapter, and throughput with twice as many adapters as slots.

    python benchmarks/speed/residency.py                             # about 4 minutes on 2 cores
    python benchmarks/speed/residency.py --device cuda --dtype bfloat16

Memory is the growth of the process (or device), relative to the adapter's file. Throughput is that
of a queue of prompts, sorted by domain and cut into batches, with as many slots as domains and with
half as many, so that each pass loads every adapter again once. PEFT gets the same slots by means of
``load_adapter`` and ``delete_adapter``. On a CPU evicted adapters are in the same memory as the
slots, so that loading them again is cheap there.
"""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import Experiment, Work, ratios
from shape import Bench, bench

from lora_domains import DomainModel

ROWS, PROMPT, NEW = 8, 16, 8


def occupied(device: str) -> int:
    """Bytes held by this process, or by its tensors on the device."""
    gc.collect()
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, or it would hide growth
    return int(psutil.Process().memory_info().rss)


def memory(experiment: Experiment, test: Bench, rank: int, count: int) -> None:
    """Bytes per resident adapter over the bytes of its weights on disk."""
    folders = test.adapters(min(4, count), rank)
    folders = [folders[i % len(folders)] for i in range(count)]
    file = (folders[0] / "adapter_model.safetensors").stat().st_size
    grown = {}
    # The first adapter also wraps the base's linears; the others add their own memory only.
    model = test.ours(folders[:1], slots=count)
    before = occupied(experiment.device)
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, name=f"d{number}")
    grown["ours"] = occupied(experiment.device) - before
    del model
    peft = test.peft(folders[:1])
    before = occupied(experiment.device)
    for number, folder in enumerate(folders[1:], start=1):
        peft.load_adapter(folder, adapter_name=f"d{number}")
    grown["peft"] = occupied(experiment.device) - before
    ours, theirs = (grown[who] / (count - 1) / file for who in ("ours", "peft"))
    experiment.figure(f"memory per resident adapter over its file, rank {rank}", "×", ours, theirs,
                      at_most=1.05)  # fmt: skip


Batch = tuple[list[str], list[str]]
"""Prompts, and the domain of each."""


def queue(prompts: list[str], domains: list[str], *, ordered: bool) -> list[Batch]:
    """Batches of ``ROWS``, with equally many prompts of each domain, contiguous or alternating."""
    rows = [(prompt, domains[i % len(domains)]) for i, prompt in enumerate(prompts)]
    if ordered:
        rows.sort(key=lambda row: domains.index(row[1]))
    parts = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    return [([p for p, _ in part], [d for _, d in part]) for part in parts]


def ours(model: DomainModel, batches: list[Batch]) -> Work:
    def work() -> None:
        for prompts, domains in batches:
            model.generate(prompts, domains=domains, max_new_tokens=NEW, min_new_tokens=NEW)

    return work


def evictions(model: DomainModel, batches: list[Batch]) -> int:
    """The number of evictions in one more pass of the queue."""
    count, here = 0, set(model.bank.on_device)
    for batch in batches:
        ours(model, [batch])()
        now = set(model.bank.on_device)
        count += len(here - now)
        here = now
    return count


class SlottedPeft:
    """PEFT with at most ``slots`` adapters loaded; the least recently used is deleted first."""

    def __init__(self, peft: Any, paths: list[Path], slots: int, tokenizer: Any) -> None:
        self.peft, self.slots, self.tokenizer = peft, slots, tokenizer
        self.folders = {f"d{i}": path for i, path in enumerate(paths)}
        self.loaded = ["d0"]

    def serve(self, batches: list[Batch]) -> Work:
        """Work: batches of one domain each."""

        def work() -> None:
            for prompts, domains in batches:
                self._bring(domains[0])
                inputs = self.tokenizer(prompts, return_tensors="pt").to(self.peft.device)
                out = self.peft.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                    do_sample=False, pad_token_id=0, max_new_tokens=NEW, min_new_tokens=NEW,
                )  # fmt: skip
                self.tokenizer.batch_decode(out[:, PROMPT:], skip_special_tokens=True)

        return work

    def _bring(self, name: str) -> None:
        if name in self.loaded:
            self.loaded.remove(name)
        else:
            self.peft.load_adapter(self.folders[name], adapter_name=name)
            self.peft.eval()
        self.peft.set_adapter(name)
        if len(self.loaded) == self.slots:
            self.peft.delete_adapter(self.loaded.pop(0))
        self.loaded.append(name)


def throughput(experiment: Experiment, test: Bench, slots: int) -> None:
    """Rows per second with domains that fit the slots, and with twice as many."""
    many = 2 * slots
    paths = test.adapters(many)
    names = [f"d{i}" for i in range(many)]
    prompts = test.prompts(many * ROWS, PROMPT)
    experiment.say(f"{len(prompts)} prompts, {slots} slots: {slots} domains and {many}")
    fit = queue(prompts, names[:slots], ordered=True)
    twice = queue(prompts, names, ordered=True)
    # Separate models: one queue must not evict adapters of the other.
    models = {kind: test.ours(paths, slots=slots) for kind in ("fit", "twice", "dealt")}
    tokenizer = models["fit"].tokenizer
    pefts = {
        k: SlottedPeft(test.peft(paths[:1]), paths, slots, tokenizer) for k in ("fit", "twice")
    }
    dealt = queue(prompts, names, ordered=False)
    runs = experiment.turns(
        {
            "ours, fit": ours(models["fit"], fit),
            "peft, fit": pefts["fit"].serve(fit),
            "ours, twice": ours(models["twice"], twice),
            "peft, twice": pefts["twice"].serve(twice),
            "ours, dealt": ours(models["dealt"], dealt),
        },
        per=len(prompts),
    )
    rate = {who: [1 / seconds for seconds in of] for who, of in runs.items()}
    for kind, count in (("fit", slots), ("twice", many)):
        experiment.figure(f"throughput, {slots} slots, {count} domains", "rows/s",
                          rate[f"ours, {kind}"], rate[f"peft, {kind}"], better="more")  # fmt: skip
    kept = {w: ratios(rate[f"{w}, twice"], rate[f"{w}, fit"]) for w in ("ours", "peft")}
    experiment.figure("throughput kept with twice as many domains as slots", "×", kept["ours"],
                      kept["peft"], at_least=0.5)  # fmt: skip
    experiment.figure("the same, every batch holding every domain", "×",
                      ratios(rate["ours, dealt"], rate["ours, fit"]), better="more")  # fmt: skip
    for kind, batches in (("fit", fit), ("twice", twice), ("dealt", dealt)):
        experiment.figure(f"adapters evicted per pass, {kind}", "",
                          evictions(models[kind], batches))  # fmt: skip


def main() -> None:
    experiment = Experiment("residency", __doc__)
    slots, count = (2, 6) if experiment.quick else (4, 33)
    with bench(experiment) as test:
        full = test.shape.rank
        for rank in (full, full // 2):
            memory(experiment, test, rank, count)
        throughput(experiment, test, slots)
        experiment.save(test.settings | {"slots": slots, "rows": ROWS, "prompt": PROMPT,
                                         "new_tokens": NEW, "resident": count})  # fmt: skip


if __name__ == "__main__":
    main()
