"""How to keep the general knowledge of a base that is not ours, and what it costs: ways to train.

    python benchmarks/training/general.py --base SmolLM2 --data DATA     # continues if stopped
    python benchmarks/training/general.py --base SmolLM2 --data DATA --ways plain "own KL" --seeds 3
    python benchmarks/training/general.py --table                        # of the stored runs
    python benchmarks/training/general.py --tiny --data DATA             # a trial, on the CPU

On two cores of a CPU runs are shorter with short rows, fewer epochs and fewer questions:
``--domains sms_spam twitter_financial_news medquad --characters 500 --epochs 2 --questions 200``.
Such runs are stored elsewhere (``--out``).

Each way trains the same adapters on a few hundred rows of public sets and differs in one thing:
nothing is kept, or KL from the base, or replay; on texts that the base wrote itself (all, fewer or
shorter ones, as often as the time rule allows or in every step) or on those of the embedded world;
or the adapter is changed afterwards (scaled, or by PEFT's ``reduce_intruder_dimension``); or, for
answers in free text, the training answers are rewritten by the base (after SDFT, Yang et al. 2024).
Measured are the domain (score and nats on test rows) and what the base knew before: nats of
WikiText, OpenBookQA, the facts of the embedded world, instructions (a third of the suite), and KL
on texts of the base that no run read.

Runs are stored as they end; ``--minutes`` begins none after that time.
``--workers`` processes share the device, since a small base leaves most of it idle: times of runs
are comparable with ``--workers 1`` only.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lora_domains import Domain, DomainModel
    from lora_domains.data.source import Source
    from lora_domains.evaluation.scorer import Part
    from lora_domains.tokenization.encoded import EncodedExample

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "general.json"
UNLIMITED: dict[str, Any] = {"general_cost": 1000.0}
NO_LIMIT = {"drift": 1e9}
"""An epoch is chosen by the domain alone, or what is kept would depend on the choice."""
SCALES = (0.4, 0.7)
EARLIER = {"LENGTH": 64, "TOKENS": 160, "CONTINUED": 2}
"""Constants of ``own_text`` for ways that do not change them, and for the texts that tell drift."""


def kl(rows: int = 6, length: int = 64, *, continued: int = 2, **settings: Any) -> dict[str, Any]:
    """KL on ``rows`` texts of the base in a step that reads some, of ``length`` tokens at most."""
    constants = {**EARLIER, "LENGTH": length, "CONTINUED": continued, "FEWEST": rows}
    return {"retention": "kl", "general_rows": rows, "constants": constants, **settings}


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"retention": "none"},
    "default": {},
    "default, rate / 3": {"lr": 1 / 3},
    "own KL": kl(),
    "toy KL": kl(general="toy", **UNLIMITED),
    "own KL, every step": kl(**UNLIMITED),
    "own replay": {"retention": "replay", "constants": EARLIER},
    "own KL, weight 2": kl(kl=2.0),
    "own KL, 64 texts": kl(texts=64),
    "own KL, 24 tokens": kl(length=24),
    "own KL, 2 texts a step": kl(2),
    "own KL, 24 tokens, 2 texts": kl(2, 24),
    "own KL, 24 tokens, 2 texts, weight 5": kl(2, 24, kl=5.0),
    "own KL, 24 tokens, 4 texts, every step": kl(4, 24, **UNLIMITED),
    "own KL, 24 tokens, 2 texts, 3 of 4 answers": kl(2, 24, continued=4),
    "own KL, 24 tokens, 2 texts, rate / 3": kl(2, 24, lr=1 / 3),
    "own KL, 12 tokens, 2 texts": kl(2, 12),
    "rate / 3": {"retention": "none", "lr": 1 / 3},
    "own KL, weight 0.1": kl(kl=0.1),
    "intruders reduced": {"retention": "none", "after": "intruders"},
    "rewritten answers": {"retention": "none", "rewritten": True},
}
"""Settings of a domain; ``lr`` times the derived rate; what is done to texts and afterwards."""
DOMAINS = ("sms_spam", "medquad", "pubmedqa", "twitter_financial_news")
QUESTIONS = ("openbookqa", "facts", "instructions")


def jobs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(way, domain, seed) of every run."""
    found = [(way, domain, seed) for seed in range(options.seeds) for domain in options.domains
             for way in options.ways]  # fmt: skip
    return [job for job in found if job[1] == "medquad" or not WAYS[job[0]].get("rewritten")]


# ── A worker: one model, several runs ───────────────────────────────────────────────────────────


class Worker:
    """The base, the rows, and what the base scores on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from lora_domains import DomainModel
        from lora_domains.console import Display
        from lora_domains.probes import own_text
        from lora_domains.training import retention

        # Of no project: the rows of these runs are in no ledger.
        os.environ["LORA_DOMAINS_PROJECT"] = tempfile.mkdtemp()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
        self.options = options
        if options.tiny:
            own_text.COUNTS = {"training": 12, "selection": 4, "test": 4}
        places = [(own_text, name) for name in ("COUNTS", *EARLIER)] + [(retention, "FEWEST")]
        self.constants = {name: (place, getattr(place, name)) for place, name in places}
        self.model = DomainModel.from_pretrained(
            options.base, dtype=options.dtype, device=options.device,
            display=Display(quiet=True), out=tempfile.mkdtemp(),
        )  # fmt: skip
        self.of_base: dict[str, dict[str, float]] = {}

    def run(self, way: str, name: str, seed: int) -> dict[str, Any]:
        """Train one way on one domain with one seed, and measure the adapter."""
        began, settings = time.monotonic(), dict(WAYS[way])
        constants = settings.pop("constants", {})
        if texts := settings.pop("texts", None):
            constants |= {"COUNTS": {**self.constants["COUNTS"][1], "training": texts}}
        with self.changed(constants):
            return self.trained(way, name, seed, settings, began)

    @contextmanager
    def changed(self, constants: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the package's ``constants`` are these; afterwards what they were before."""
        before = {name: getattr(module, name) for name, (module, _) in self.constants.items()}
        for name, (module, value) in self.constants.items():
            setattr(module, name, constants.get(name, value))
        try:
            yield
        finally:
            for name, (module, _) in self.constants.items():
                setattr(module, name, before[name])

    def trained(
        self, way: str, name: str, seed: int, settings: dict[str, Any], began: float
    ) -> dict[str, Any]:
        """The record of one run."""
        from lora_domains.analysis.scale_curve import scaled
        from lora_domains.console import Display
        from lora_domains.dataset import load_dataset
        from lora_domains.domain import with_settings
        from lora_domains.training.plan import derived_rate, make_plan

        after, rewrite = settings.pop("after", None), settings.pop("rewritten", False)
        general = toy_texts() if settings.pop("general", None) else None
        domain = declared(name, self.options, general)
        if rewrite:
            train = domain.data.train
            assert isinstance(train, list)
            rows = rewritten(self.model, train)
            domain = replace(domain, data=replace(domain.data, train=rows))
        if "lr" in settings:
            settings["lr"] *= derived_rate(self.model.base)[0]
        domain = with_settings(
            domain, epochs=self.options.epochs, patience=99, seed=seed, **NO_LIMIT, **settings
        )
        model = self.model
        model.display = Display(quiet=True)
        # The model's own dataset of these rows may have the texts of the way before.
        dataset = load_dataset(domain, model.base, model.display)
        _ = dataset.general.predictions  # what the base writes once is no part of a run
        plan = make_plan(model.base, dataset)
        card = model.fit(domain)
        assert card is not None
        training = card.adapter.training
        found = self.measure(name, name)
        scales = []
        if way == "plain" and seed == 0:
            with scaled(model.bank, name, SCALES) as copies:
                scales = [{"scale": scale, **self.measure(name, copy)}
                          for scale, copy in copies.items()]  # fmt: skip
        if after == "intruders":
            folder = without_intruders(self.options, model.out / name)
            model.load_adapter(folder, name)
            found = self.measure(name, name)
        if name not in self.of_base:
            with model.bank.routed(None):
                of_domain = self.of_domain(name)
            self.of_base[name] = of_domain | self.knowledge_of_base
        texts = dataset.general.windows("training", dataset.tokenization, 480)
        read = plan.general_reads * mean(map(len, texts)) if texts else 0.0
        tokens = plan.epochs * sum(len(row.encoded) for row in dataset.train)
        model.unload(name)
        return {
            "way": way, "domain": name, "seed": seed, "adapter": found, "scales": scales,
            "base": self.of_base[name], "lr": training["lr"], "rank": training["rank"],
            "steps": plan.steps, "every": plan.general_every, "texts": plan.retention.rows,
            "general_tokens": read / tokens, "best_epoch": training["best_epoch"],
            "phases": training["phases"], "seconds": time.monotonic() - began,
            "workers": self.options.workers, "epochs": self.options.epochs,
            "rows": len(dataset.train), "test_rows": len(dataset.test), **self.asked,
        }  # fmt: skip

    def measure(self, name: str, adapter: str) -> dict[str, float]:
        """The domain's score and nats on test rows, and what is left of the base's knowledge."""
        from lora_domains.inference.reference import Reference

        with self.model.bank.routed(adapter):
            found = self.of_domain(name)
        kl = Reference(self.model.bank, self.own_test).compare(adapter)["general_kl"]
        return found | self.knowledge(adapter) | {"kl": kl}

    def of_domain(self, name: str) -> dict[str, float]:
        """Score and nats on test rows, of what is routed."""
        from lora_domains.inference.likelihoods import answer_nats, choices_and_nats
        from lora_domains.inference.scores import choice_score
        from lora_domains.training.validation import validation_figures

        dataset, core, pad = self.model.dataset(name), self.model.base.model, self.model.base.pad
        rows, records = [row.encoded for row in dataset.test], None
        if rows[0].choices:
            logprobs, nats, tokens = choices_and_nats(core, rows, pad)
            records = [choice_score(dataset.domain.task, row, example)
                       for row, example in zip(logprobs, rows, strict=True)]  # fmt: skip
        else:
            nats, tokens = answer_nats(core, rows, pad)
        each = float(nats.sum() / tokens.sum())
        figures = validation_figures(dataset.domain, rows, records, each)
        return {"nats": each, "score": float(figures["score"])}

    def knowledge(self, adapter: str | None) -> dict[str, float]:
        """Nats of WikiText, and the share of questions and instructions answered rightly."""
        from lora_domains.console import Display
        from lora_domains.evaluation.scorer import Scorer
        from lora_domains.inference.likelihoods import answer_nats

        model = self.model
        with model.bank.routed(adapter):
            nats, tokens = answer_nats(model.base.model, self.wikitext, model.base.pad)
        found = {"wikitext": float(nats.sum() / tokens.sum())}
        scorer = Scorer(model.bank, Display(quiet=True))
        for suite, part in self.questions:
            chosen = scorer.scores(part, [adapter])[adapter]
            # The prediction for an instruction is 1 where its answer passes.
            right = [1 if row.encoded.target < 0 else row.encoded.target for row in part.rows]
            found[suite] = float(np.mean([score["prediction"] == target for score, target
                                          in zip(chosen, right, strict=True)]))  # fmt: skip
        return found

    @property
    def asked(self) -> dict[str, Any]:
        """What ``knowledge`` depends on, beside the adapter."""
        return {
            "device": str(self.model.base.device), "dtype": str(self.model.base.dtype),
            "questions": {suite: len(part.rows) for suite, part in self.questions},
        }  # fmt: skip

    @cached_property
    def knowledge_of_base(self) -> dict[str, float]:
        """``knowledge`` of the base, which a stored run may have measured."""
        runs = json.loads(self.options.out.read_text())["runs"] if self.options.out.exists() else []
        for run in runs:
            if all(run[key] == value for key, value in self.asked.items()):
                return {name: run["base"][name] for name in ("wikitext", *QUESTIONS)}
        return self.knowledge(None)

    @cached_property
    def questions(self) -> list[tuple[str, "Part"]]:
        """OpenBookQA, facts of the embedded world and instructions, each as a part to score."""
        from lora_domains.evaluation.contenders import probe_part
        from lora_domains.probes.instructions import instruction_probe, instructions
        from lora_domains.probes.standard import openbookqa
        from lora_domains.probes.suite import load_suite
        from lora_domains.tokenization.tokenization import Tokenization

        rows = [
            {"question": row["question"], "choices": row["choices"],
             "answer": int(str(row["answer"]).removeprefix("answer")) - 1}
            for row in read_rows(self.options.data / "probe_openbookqa" / "test.jsonl")
        ]  # fmt: skip
        tokenization = Tokenization(self.model.tokenizer, self.model.base.context)
        probes = {
            "openbookqa": openbookqa(rows),
            "facts": load_suite("facts").probes[0],
            "instructions": instruction_probe("instructions", instructions()[::3]),
        }
        most = self.options.questions
        found = []
        for name, probe in probes.items():
            examples = [example for _, example in probe.examples()]
            picked = examples[:: max(1, len(examples) // most)][:most]
            found.append((name, probe_part(probe, picked, self.model.base, tokenization)))
        return found

    @cached_property
    def wikitext(self) -> list["EncodedExample"]:
        """Paragraphs of WikiText, 256 tokens at most."""
        from lora_domains.inference.likelihoods import start_of_text
        from lora_domains.tasks import Example
        from lora_domains.tokenization.tokenization import Tokenization

        path = self.options.data / "text_wikitext2" / "valid.txt"
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        long = [line for line in lines if len(line) > 400]
        picked = [long[at] for at in np.random.default_rng(0).permutation(len(long))]
        base = self.model.base
        tokenization = Tokenization(base.tokenizer, 256, start=start_of_text(base))
        texts = [Example(f"wiki:{n}", "", text) for n, text in enumerate(picked)]
        return [tokenization.windows(text)[0] for text in texts[: self.options.questions // 4]]

    @cached_property
    def own_test(self) -> list["EncodedExample"]:
        """Texts of the base that no run reads."""
        from lora_domains.console import Display
        from lora_domains.probes.own_text import OwnText
        from lora_domains.tokenization.tokenization import Tokenization

        with self.changed(EARLIER):
            own = OwnText(base=self.model.base, display=Display(quiet=True))
            tokenization = Tokenization(self.model.tokenizer, self.model.base.context)
            return own.windows("test", tokenization, 128)


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


TEXTS = ("text", "question", "context", "answer")
"""Columns whose length counts."""


def declared(name: str, options: argparse.Namespace, general: "Source | None") -> "Domain":
    """The domain ``name`` with the rows that all ways train on and are measured by."""
    from lora_domains import Classification, Data, Domain, Generation

    train, test = (
        [row for row in read_rows(options.data / name / f"{part}.jsonl")
         if sum(len(row.get(column) or "") for column in TEXTS) <= options.characters]
        for part in ("train", "test")
    )  # fmt: skip
    different = {_key(row): row for row in reversed(train)}
    unseen = [row for row in test if _key(row) not in different]
    rows = list(different.values())
    rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    count, tenth = options.rows, max(20, options.rows // 4)
    tasks: dict[str, Any] = {
        "sms_spam": Classification(text="text", label="label", positive="spam"),
        "pubmedqa": Classification(text=("question", "context"), label="label"),
        "medquad": Generation(text="question", answer="answer"),
        "twitter_financial_news": Classification(text="text", label="label"),
    }
    data = Data(rows[:count], rows[count : count + tenth], unseen[: 2 * tenth], general,
                drop_long=True)  # fmt: skip
    return Domain(name, tasks[name], data)


def _key(row: dict[str, Any]) -> str:
    """What is the same in copies of a row."""
    return " ".join(str(row.get("text") or row["question"]).casefold().split())[:80]


def toy_texts() -> list[dict[str, str]]:
    """The general text of the embedded world, as rows of one's own."""
    from lora_domains.probes.general_text import embedded_texts

    return [{"text": text} for text in (*embedded_texts("train"), *embedded_texts("validation"))]


REWRITE = (
    "{question}\n\nHere is a reference answer:\n{answer}\n\nUsing the reference answer, answer the "
    "question in your own words."
)


def rewritten(model: "DomainModel", rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with answers that the base wrote after reading the given ones; an answer that shares
    too few words with the given one is not taken."""
    from lora_domains.inference.generation import generate
    from lora_domains.tasks import Generation

    base, task, found, length = model.base, Generation(), [], 160
    most = min(600, model.base.context - length)
    prompts = [
        base.chat_template.prompt([{"role": "user", "content": REWRITE.format(**row)}])[-most:]
        for row in rows
    ]
    answers: list[str] = []
    with model.bank.routed(None):
        for at in range(0, len(prompts), 100):
            part = prompts[at : at + 100]
            answers += generate(base.model, base.tokenizer, part, max_new_tokens=length)
    for row, answer in zip(rows, answers, strict=True):
        taken = task.score_text(answer, row["answer"])["f1"] >= 0.3
        found.append(row | {"answer": answer.strip()} if taken else row)
    return found


def without_intruders(options: argparse.Namespace, folder: Path) -> Path:
    """A copy of the adapter in ``folder`` after PEFT's ``reduce_intruder_dimension``."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from transformers import AutoModelForCausalLM

    core = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapted = PeftModel.from_pretrained(core.to(device), folder)
    reduce_intruder_dimension(adapted, logging_sink=None)
    out = Path(tempfile.mkdtemp())
    adapted.save_pretrained(out, selected_adapters=["intruder_reduced"])
    return out / "intruder_reduced"


# ── All runs ────────────────────────────────────────────────────────────────────────────────────

_worker: list[Worker] = []


def start(options: argparse.Namespace) -> None:
    _worker.append(Worker(options))


def work(job: tuple[str, str, int]) -> dict[str, Any]:
    return _worker[0].run(*job)


def run_all(options: argparse.Namespace, stored: list[dict[str, Any]]) -> None:
    """Run what is not stored yet, and store each run as it ends."""
    done = {(run["way"], run["domain"], run["seed"]) for run in stored}
    waiting = [job for job in jobs(options) if job not in done]
    began, running = time.monotonic(), dict[Future[dict[str, Any]], tuple[str, str, int]]()
    pool = ProcessPoolExecutor(options.workers, get_context("spawn"), start, (options,))
    with pool:
        while running or waiting:
            late = time.monotonic() - began > 60 * options.minutes
            waiting = [] if late else waiting
            while waiting and len(running) < options.workers:
                job = waiting.pop(0)
                running[pool.submit(work, job)] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    sys.stdout.write(f"{job}: {error!r}\n")
                    continue
                stored.append(future.result())
                whole = options.out.with_suffix(".part")  # other workers read what is stored
                whole.write_text(json.dumps({"runs": stored}, indent=1) + "\n")
                whole.replace(options.out)
                sys.stdout.write(f"{time.monotonic() - began:5.0f} s  {line(stored[-1])}\n")
                sys.stdout.flush()


def lost(run: dict[str, Any]) -> dict[str, float]:
    """What the adapter gained on its domain and lost elsewhere; a loss is above 0."""
    base, own = run["base"], run["adapter"]
    return {
        "score": own["score"], "gain": base["nats"] - own["nats"],
        "wikitext": own["wikitext"] - base["wikitext"], "kl": own["kl"],
        **{name: 100 * (base[name] - own[name]) for name in QUESTIONS},
    }  # fmt: skip


def line(run: dict[str, Any]) -> str:
    figures = lost(run)
    return (
        f"{run['domain']:9} {run['way']:24} seed {run['seed']}  score {figures['score']:.3f}, nats "
        f"-{figures['gain']:.3f}; lost: WikiText {figures['wikitext']:+.3f}, OpenBookQA "
        f"{figures['openbookqa']:+.1f}, facts {figures['facts']:+.1f}, instructions "
        f"{figures['instructions']:+.1f}, KL {figures['kl']:.3f}; "
        f"1 of {run['every']}, tokens {run['general_tokens']:.2f}, "
        f"steps {run['phases'].get('steps', 0):.0f} s, {run['seconds']:.0f} s"
    )


def rows_of(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(way, its runs), with the scales of plain adapters as ways of their own."""
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        if own:
            yield way, own
        for scale in SCALES if way == "plain" else ():
            at_scale = [run | {"adapter": one} for run in own for one in run["scales"]
                        if one["scale"] == scale]  # fmt: skip
            if at_scale:
                yield f"plain at scale {scale:g}", at_scale


def table(runs: Sequence[dict[str, Any]]) -> str:
    domains = [name for name in DOMAINS if any(run["domain"] == name for run in runs)]
    lines = [
        "| way | " + " | ".join(f"{name}: score, nats gained" for name in domains)
        + " | WikiText, nats | OpenBookQA, points | facts, points | instructions, points | KL "
        "| general tokens |",
        "|---" * (7 + len(domains)) + "|",
    ]  # fmt: skip
    for way, own in rows_of(runs):
        cells = []
        for name in domains:
            figures = [lost(run) for run in own if run["domain"] == name]
            score, gain = (mean(f[key] for f in figures) if figures else None
                           for key in ("score", "gain"))  # fmt: skip
            cells.append("–" if score is None else f"{score:.3f}, {gain:.2f}")
        every = [lost(run) for run in own]
        cells += [f"{mean(f[key] for f in every):+.3f}" for key in ("wikitext",)]
        cells += [f"{mean(f[key] for f in every):+.1f}" for key in QUESTIONS]
        cells += [f"{mean(f['kl'] for f in every):.3f}",
                  f"{mean(run['general_tokens'] for run in own):.0%}"]  # fmt: skip
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder of the base; with --tiny the embedded one")
    parser.add_argument("--data", type=Path, help="folder of public sets, one subfolder each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of stored runs")
    parser.add_argument("--tiny", action="store_true", help="a few rows on the embedded base")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--device", help="cpu or cuda; by default what there is")
    parser.add_argument("--dtype", default="float32", help="precision of the base")
    parser.add_argument("--rows", type=int, default=320, help="training rows of a domain")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way on each domain")
    parser.add_argument("--questions", type=int, default=800, help="of each kind, at most")
    parser.add_argument("--characters", type=int, default=10**6, help="of a row, at most")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--domains", nargs="*", choices=DOMAINS, default=list(DOMAINS[:3]))
    options = parser.parse_args()
    stored: list[dict[str, Any]] = []
    if options.out.exists():
        stored = json.loads(options.out.read_text())["runs"]
    if options.tiny:
        from lora_domains.embedded import BASE_PATH

        options.base, options.rows, options.epochs = str(BASE_PATH), 24, 1
        options.questions = 20
    if not options.table:
        if options.data is None or options.base is None:
            parser.error("--data and --base are needed")
        run_all(options, stored)
    sys.stdout.write(table(stored) + "\n")


if __name__ == "__main__":
    main()
