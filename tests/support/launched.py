"""Train, score and report, in several processes and in the test process for comparison."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import retention as _  # noqa: F401 (registers the method blend)
from support.general_text import use_general_text

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import TrainingInterrupted, UsageError
from lora_domains.inference import batches
from lora_domains.inference import likelihoods as scoring
from lora_domains.inference.generation import generate_in_batches
from lora_domains.joint.run import JointRun
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Probe, Suite
from lora_domains.report.card import read_items
from lora_domains.tasks import Classification, Example, MultipleChoice, Preference
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.training import fit
from lora_domains.training.loop import Run

QUESTIONS = [{"question": "After alpha comes", "choices": ["beta", "stone"], "answer": 0}] * 20
SUITE = Suite(
    "world",
    (Probe("world", MultipleChoice(prompt="{question}"), QUESTIONS),),
    lambda: [f"the {word} river is red" for word in ("alpha", "beta", "gamma", "stone")],
)
TRAINING = [f"a {word} cloud is blue" for word in ("alpha", "beta", "gamma", "stone", "win")]
SELECTION = [f"my {word} is green" for word in ("alpha", "beta", "gamma")]


def declared(rows: Sequence[dict[str, Any]], **settings: Any) -> Domain:
    """49 training rows in batches of 8: the last one of an epoch holds a single row."""
    domain = Domain(
        "spam", Classification(positive="spam"), Data(rows[:49], rows[49:70], rows[70:])
    )
    defaults = {"lr": 0.01, "batch_size": 8, "rank": 4, "epochs": 2, "retention": "blend",
                "general_rows": 3}  # fmt: skip
    return with_settings(domain, **(defaults | settings))


@contextmanager
def small_texts() -> Iterator[pytest.MonkeyPatch]:
    """Inside, general knowledge is ``SUITE`` and general text a few sentences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_domains.probes.suite.default_suite", lambda *_: SUITE)
        use_general_text(patch, TRAINING, SELECTION)
        patch.setattr("lora_domains.probes.own_text.writes_own_text", lambda _: False)
        yield patch


def pairs(rows: Sequence[dict[str, Any]]) -> Domain:
    """13 pairs of answers to train on in batches of 4: the last of an epoch holds a single one."""
    ranked = [
        {"prompt": row["text"], "chosen": "blue stone " * (1 + n % 3), "rejected": "red"}
        for n, row in enumerate(rows)
    ]
    data = Data(ranked[:13], ranked[13:20], ranked[20:30])
    settings = {"lr": 0.01, "batch_size": 4, "rank": 4, "epochs": 2, "retention": "none"}
    return with_settings(Domain("pairs", Preference(), data), **settings)


def curve(domain: Domain, base: Path, out: Path, *, sharded: bool = False) -> dict[str, Any]:
    """The loss of every step and epoch, and the scores of every item."""
    model = DomainModel.from_pretrained(base, out=out, sharded=sharded)
    steps: list[float] = []
    make_run = fit.make_run

    def recorded(*arguments: Any) -> Run:
        run = make_run(*arguments)
        run.log = lambda values, step: steps.append(values.get("loss", values.get("training_loss")))
        return run

    with small_texts() as patch:
        patch.setattr(batches, "TOKENS", 200)  # several batches, more on one rank than on the other
        patch.setattr(fit, "make_run", recorded)
        card = model.fit(domain)
        evaluation = model.evaluate(domain, suite=SUITE)
    return {
        "steps": steps,
        "history": [
            {k: r[k] for k in ("training_loss", "validation_loss", "score")}
            for r in card.adapter.training["history"]
        ],
        "world_size": card.environment["world_size"],
        "verdict": evaluation.verdict,
        "items": read_items(out / domain.name),
    }


def scored(base: Path, shared: bool, *, sharded: bool = False) -> dict[str, Any]:
    """Nats, choices, drift and generated text of 7 items in batches of at most 60 tokens."""
    from support.adapters import strong

    model = DomainModel.from_pretrained(base, sharded=sharded)
    model.bank.add(strong(model.base, "a"))
    tokenization = Tokenization(model.tokenizer, 64)
    items = [
        tokenization.encode(
            Example(f"{n}", "red " * (3 + 2 * n), "beta", ("beta", "stone call"), 0)
        )
        for n in range(7)
    ]
    one, pad = model.base.model, model.base.pad
    with pytest.MonkeyPatch.context() as patch, distributed.sharing() if shared else nullcontext():
        patch.setattr(batches, "TOKENS", 60)
        return {
            "nats": [part.tolist() for part in scoring.answer_nats(one, items, pad)],
            "choices": [row.tolist() for row in scoring.choice_logprobs(one, items, pad)],
            "drift": {
                k: v.tolist() for k, v in scoring.drift(model.bank, items, pad, ["a"])["a"].items()
            },
            "texts": generate_in_batches(one, model.tokenizer, items, 4),
        }


def interrupted(
    base: Path, rows: Sequence[dict[str, Any]], out: Path, *, validating: bool,
    sharded: bool = False, resume: bool = True, left: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """A signal reaches one process, after a step or during validation; then the run is resumed,
    and ``left`` is the folder as the interrupted run leaves it."""
    model = DomainModel.from_pretrained(base, out=out, sharded=sharded)
    make_run = fit.make_run
    mine = distributed.state().process_index == distributed.state().num_processes - 1

    def stopped(*arguments: Any) -> Run:
        run = make_run(*arguments)
        step, figures = run.train_step, run.validation.figures

        def counting(items: Any) -> None:
            step(items)
            # After the gradients were summed: the other process learns of it in the next step.
            if run.state.total_steps == 8 and mine and not validating:
                run.signals.received = 2

        def validated() -> dict[str, Any]:
            if run.state.epoch == 1 and mine and validating:
                run.signals.received = 2
            return figures()

        run.train_step, run.validation.figures = counting, validated  # type: ignore[method-assign]
        return run

    with small_texts() as patch:
        patch.setattr(fit, "make_run", stopped)
        with pytest.raises(TrainingInterrupted) as caught:
            model.fit(declared(rows))
        patch.setattr(fit, "make_run", make_run)
        if left is not None:
            distributed.on_main(partial(shutil.copytree, out, left))
        if resume:
            model.fit(declared(rows), resume=True, tracker="tensorboard")
    return {"where": caught.value.where}


def resumed(base: Path, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Resume a run that was interrupted elsewhere."""
    with small_texts():
        DomainModel.from_pretrained(base, out=out).fit(declared(rows), resume=True)


def several(
    base: Path, rows: Sequence[dict[str, Any]], out: Path, stop: bool, sharded: bool = False
) -> dict[str, Any]:
    """Two domains trained together, one of whose batches leaves a process without rows; with
    ``stop`` a signal reaches one process after three steps, and the run is resumed."""
    domains = [declared(rows), replace(pairs(rows), name="chosen")]
    mine = distributed.state().process_index == distributed.state().num_processes - 1
    step = JointRun._step

    def stopping(self: JointRun) -> None:
        step(self)
        # After the gradients were summed: the other process learns of it in the next step.
        if self.checkpoint.step == 3 and mine:
            self.signals.received = 2

    with small_texts() as patch:
        model = DomainModel.from_pretrained(base, out=out, sharded=sharded)
        if stop:
            with patch.context() as inside:
                inside.setattr(JointRun, "_step", stopping)
                with pytest.raises(TrainingInterrupted):
                    model.fit(domains, together=2)
        cards = model.fit(domains, together=2, resume=stop)
    return {
        card.adapter.domain: [r["validation_loss"] for r in card.adapter.training["history"]]
        for card in cards
    }


def variants(base: Path, rows: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """What two seeds of a domain, and a sweep of two rates, are found to score."""
    domain = declared(rows, epochs=1)
    with small_texts():
        model = DomainModel.from_pretrained(base, out=out, display=Display(quiet=True))
        seeds = model.fit(domain, seeds=2, together=2)[0].adapter.seeds
        open_rate = with_settings(replace(domain, name="swept"), lr=None)
        card = model.fit(open_rate, sweep={"lr": [1e-5, 0.01]}, together=2)
    assert card is not None
    return {
        "seeds": {key: seeds["loss"][key] for key in ("base", "adapter", "difference")},
        "runs": [[run["settings"], run["loss"]]
                 for run in card.adapter.training["chosen_among"]["runs"]],
        "left": sorted(path.name for path in out.glob(".*.sweep")),
    }  # fmt: skip


def refused() -> str:
    """The error on every process when the main one fails."""

    def fail() -> None:
        raise UsageError(expected="a disk", found="none", hint="Buy one.")

    with pytest.raises(UsageError) as caught:
        distributed.on_main(fail)
    return str(caught.value)


def take_part(base: Path, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """All of it in a process of several; the results are written to ``out``/rankN.json."""
    resumed(base, rows, out / "begun_alone")
    results = {
        "curve": curve(declared(rows), base, out / "curve"),
        "pairs": curve(pairs(rows), base, out / "pairs"),
        "scored": scored(base, shared=True),
        "interrupted": interrupted(
            base, rows, out / "interrupted", validating=False, left=out / "left"
        ),
        "validating": interrupted(base, rows, out / "validating", validating=True),
        "several": several(base, rows, out / "several", stop=False),
        "resumed": several(base, rows, out / "resumed", stop=True),
        "variants": variants(base, rows, out / "variants"),
        "refused": refused(),
        "sharded": {
            "several": several(base, rows, out / "sharded_several", stop=False, sharded=True),
            "curve": curve(declared(rows), base, out / "sharded", sharded=True),
            "scored": scored(base, shared=True, sharded=True),
            "interrupted": interrupted(
                base, rows, out / "sharded_interrupted", validating=False, sharded=True
            ),
        },
        "ranks": distributed.state().num_processes,
    }
    Display(quiet=not distributed.is_main()).line("printed once")
    (out / f"rank{distributed.state().process_index}.json").write_text(json.dumps(results))
