"""Short fits on a random base: a small suite of questions, rows, domains, models and runs."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.device import base_on
from support.general_text import use_general_text

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import TrainingInterrupted
from lora_domains.joint import fit as joint_fit
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Probe, Suite
from lora_domains.report.report import Evaluation
from lora_domains.tasks import Classification, MultipleChoice, Task
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import fit
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan

Fitted = tuple[DomainModel, Evaluation]
QUIET = Display(quiet=True)
PAIRS = [("alpha", "beta"), ("gamma", "delta"), ("red", "green"), ("win", "prize")]
QUESTIONS = [
    {"question": f"The word after {a} is", "choices": [b, "stone", "cloud"], "answer": 0,
     "topic": f"topic {n}"}
    for n, (a, b) in enumerate(PAIRS)
] * 5  # fmt: skip
SUITE = Suite(
    "world",
    (Probe("world", MultipleChoice(prompt="{question}"), QUESTIONS, part="topic"),),
    lambda: [f"the {word} of a river is red and blue" for word in ["alpha", "beta", "gamma"]] * 4,
)  # fmt: skip


def use_small_suite(patch: pytest.MonkeyPatch) -> None:
    """Let models read ``SUITE`` and a small general text in place of the embedded ones."""
    patch.setattr("lora_domains.probes.suite.default_suite", lambda *_: SUITE)
    use_general_text(patch)


def declared(rows: Sequence[Mapping[str, Any]], name: str = "spam", task: Task | None = None,
             **settings: Any) -> Domain:  # fmt: skip
    """A domain over ``rows``, a tenth for validation and the last two tenths for the test set."""
    tenth = len(rows) // 10
    data = Data(rows[: -3 * tenth], rows[-3 * tenth : -2 * tenth], rows[-2 * tenth :])
    defaults = {"lr": 0.01, "batch_size": 16, "rank": 8, "epochs": 2}
    domain = Domain(name, task or Classification(positive="spam"), data)
    return with_settings(domain, **(defaults | settings))


def model_in(folder: Path, base: Path) -> DomainModel:
    """A quiet model that saves its adapters in ``folder``."""
    return DomainModel(base_on(base), out=folder, display=QUIET)


def clear_rows(count: int = 430) -> list[dict[str, Any]]:
    """The last word decides the label, which the random base learns from any of five seeds."""
    rows = make_rows(count)
    for row in rows:
        row["text"] += (" alpha" if row["label"] == "spam" else " beta") * 3
    return rows


def make_run(
    folder: Path,
    tiny_base: Path,
    domain: Domain,
    figures: Callable[[Run], dict[str, Any]] | None = None,
) -> Run:
    """A run built as ``DomainModel.fit`` builds it; ``figures`` replaces its validation."""
    model = model_in(folder, tiny_base)
    dataset = model.dataset(domain)
    plan = make_plan(model.base, dataset)
    run = fit.make_run(model.bank, dataset, plan, model.out, model.display)
    if figures is not None:
        run.validation.figures = partial(figures, run)  # type: ignore[method-assign]
    return run


@contextmanager
def in_float64(runs: Sequence[Run]) -> Iterator[None]:
    """Base and adapters in float64, where they stay, and all that is otherwise computed in float32
    on a base of any precision."""
    runs[0].model.double()
    for parameter in (parameter for run in runs for parameter in run.parameters):
        parameter.grad, parameter.data = None, parameter.data.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float", torch.float64)  # for rotary embeddings
        yield


def fixed(*losses: float, scores: Sequence[float] = ()) -> Callable[[Run], dict[str, Any]]:
    """Validation figures with these losses, and scores, epoch after epoch."""

    def figures(run: Run) -> dict[str, Any]:
        epoch = run.state.epoch
        score = scores[epoch] if scores else -losses[epoch]
        return {"validation_loss": losses[epoch], "accuracy": 0.5, "score": score,
                "higher_is_better": True}  # fmt: skip

    return figures


def patched_runs(patch: pytest.MonkeyPatch, **figures: Callable[[Run], dict[str, Any]]) -> None:
    """``figures`` replace the validation of runs that are trained together, by their names."""
    make_run = joint_fit.make_run

    def changing(*arguments: Any) -> Run:
        run = make_run(*arguments)
        if run.domain.name in figures:
            found = partial(figures[run.domain.name], run)
            run.validation.figures = found  # type: ignore[method-assign]
        return run

    patch.setattr(joint_fit, "make_run", changing)


def stopped_after(
    steps: int, domain: Domain, folder: Path, tiny_base: Path,
    figures: Callable[[Run], dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Train until ``steps`` are finished, then stop as Ctrl-C does."""
    run = make_run(folder, tiny_base, domain, figures)
    step = run.train_step

    def counting(rows: Sequence[EncodedExample]) -> None:
        step(rows)
        if run.state.total_steps == steps:
            run.signals.received = signal.SIGINT

    run.train_step = counting  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match="--resume to continue from this step"):
        run.fit()
    assert run.adapter_name not in run.bank


def ended(run: Run) -> dict[str, torch.Tensor]:
    """The weights that a run ends with, by name."""
    weights = run.fit().adapter.weights
    return {f"{name}.{n}": part for name, pair in weights.items() for n, part in enumerate(pair)}


def forgetful(folder: Path, tiny_base: Path, **settings: Any) -> dict[str, Any]:
    """The training record of a run that forgets unless ``settings`` prevent it."""
    spam = declared(clear_rows(200), epochs=2, **({"lr": 0.02} | settings))
    card = model_in(folder, tiny_base).fit(spam)
    record: dict[str, Any] = card.adapter.training
    return record
