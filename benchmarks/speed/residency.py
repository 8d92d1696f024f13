"""What a resident adapter weighs, and what it costs to work with twice as many as there are slots.

    python benchmarks/speed/residency.py                             # about 4 minutes on 2 cores
    python benchmarks/speed/residency.py --device cuda --dtype bfloat16

Memory is what the process (or the device) grows by over the adapter's own file. Throughput is that
of a queue of prompts, sorted by domain and cut into batches, with as many slots as domains and with
half as many: each pass then brings every adapter back once. PEFT is given the same slots by hand:
``delete_adapter`` and ``load_adapter``.
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

ROWS, PROMPT, NEW = 8, 16, 16


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
    # The first wraps the base's linears; what the others add is what an adapter weighs.
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


def queue(prompts: list[str], domains: list[str], ordered: bool) -> list[list[tuple[str, str]]]:
    """Batches of (prompt, domain): each domain has as many prompts, next to each other or dealt."""
    rows = [(prompt, domains[i % len(domains)]) for i, prompt in enumerate(prompts)]
    if ordered:
        rows.sort(key=lambda row: domains.index(row[1]))
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def ours(model: DomainModel, batches: list[list[tuple[str, str]]]) -> Work:
    def work() -> None:
        for batch in batches:
            prompts, domains = map(list, zip(*batch, strict=True))
            model.generate(prompts, domains=domains, max_new_tokens=NEW, min_new_tokens=NEW)

    return work


def evictions(model: DomainModel, batches: list[list[tuple[str, str]]]) -> int:
    """How often an adapter leaves its slot for another in one more pass of the queue."""
    count, here = 0, set(model.bank.on_device)
    for batch in batches:
        ours(model, [batch])()
        now = set(model.bank.on_device)
        count += len(here - now)
        here = now
    return count


class SlottedPeft:
    """PEFT with at most ``slots`` adapters loaded, the longest unused taken out first."""

    def __init__(self, peft: Any, folders: dict[str, Path], slots: int, tokenizer: Any) -> None:
        self.peft, self.folders, self.slots, self.tokenizer = peft, folders, slots, tokenizer
        self.order = ["d0"]

    def serve(self, batches: list[list[tuple[str, str]]]) -> Work:
        def work() -> None:
            for batch in batches:
                prompts, domains = map(list, zip(*batch, strict=True))
                for name in dict.fromkeys(domains):
                    self._bring(name)
                self.peft.set_adapter(domains[0])
                inputs = self.tokenizer(prompts, return_tensors="pt").to(self.peft.device)
                # One domain in the batch: no need to name rows.
                named = {"adapter_names": domains} if len(set(domains)) > 1 else {}
                out = self.peft.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                    do_sample=False, pad_token_id=0, max_new_tokens=NEW, min_new_tokens=NEW,
                    **named,
                )  # fmt: skip
                self.tokenizer.batch_decode(out[:, PROMPT:], skip_special_tokens=True)

        return work

    def _bring(self, name: str) -> None:
        if name in self.order:
            self.order.remove(name)
        else:
            self.peft.load_adapter(self.folders[name], adapter_name=name)
            self.peft.eval()
            if len(self.order) == self.slots:
                self.peft.set_adapter(name)
                self.peft.delete_adapter(self.order.pop(0))
        self.order.append(name)


def throughput(experiment: Experiment, test: Bench, slots: int) -> None:
    """Rows a second with domains that fit the slots, and with twice as many."""
    many = 2 * slots
    paths = test.adapters(many)
    folders = {f"d{i}": path for i, path in enumerate(paths)}
    names = list(folders)
    prompts = test.prompts(many * ROWS, PROMPT)
    experiment.say(f"{len(prompts)} prompts, {slots} slots: {slots} domains and {many}")
    model = test.ours(paths, slots=slots)
    peft = SlottedPeft(test.peft(paths[:1]), folders, slots, model.tokenizer)
    fit, twice = queue(prompts, names[:slots], True), queue(prompts, names, True)
    runs = experiment.turns(
        {"ours, fit": ours(model, fit), "ours, twice": ours(model, twice),
         "peft, fit": peft.serve(fit), "peft, twice": peft.serve(twice)},
        per=len(prompts),
    )  # fmt: skip
    for kind, what in (("fit", f"{slots} domains"), ("twice", f"{many} domains")):
        rate = {w: [1 / s for s in runs[f"{w}, {kind}"]] for w in ("ours", "peft")}
        experiment.figure(f"throughput, {slots} slots, {what}", "rows/s", rate["ours"],
                          rate["peft"], better="more")  # fmt: skip
    kept = {w: ratios(runs[f"{w}, fit"], runs[f"{w}, twice"]) for w in ("ours", "peft")}
    experiment.figure("throughput kept with twice as many domains as slots", "×", kept["ours"],
                      kept["peft"], at_least=0.5)  # fmt: skip
    for batches, what in ((fit, f"{slots} domains"), (twice, f"{many} domains")):
        experiment.figure(f"adapters evicted per pass, {slots} slots, {what}", "",
                          evictions(model, batches))  # fmt: skip


def main() -> None:
    experiment = Experiment("residency", __doc__)
    slots, count = (2, 6) if experiment.quick else (8, 33)
    with bench(experiment) as test:
        full = test.shape.rank
        for rank in (full, full // 2):
            memory(experiment, test, rank, count)
        throughput(experiment, test, slots)
        experiment.save(test.settings | {"slots": slots, "rows": ROWS, "prompt": PROMPT,
                                         "new_tokens": NEW, "resident": count})  # fmt: skip


if __name__ == "__main__":
    main()
