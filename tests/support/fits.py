"""Short fits on the random base: rows, a domain, a run, what it ends with."""

import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.models import model_in

from lora_domains.data.source import Data
from lora_domains.data.tokenization import EncodedExample
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import TrainingInterrupted
from lora_domains.tasks import Classification
from lora_domains.training import fit
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan

WEIGHTS = "adapter_model.safetensors"


def clear_rows() -> list[dict[str, Any]]:
    """430 rows; the last word decides, which the random base learns from any of five seeds."""
    rows = make_rows(430)
    for row in rows:
        row["text"] += (" alpha" if row["label"] == "spam" else " beta") * 3
    return rows


def domain(rows: Sequence[Mapping[str, Any]], name: str = "spam", **settings: Any) -> Domain:
    """A domain over ``rows``: a tenth for validation, a fifth for tests, the rest for training."""
    tenth = len(rows) // 10
    data = Data(rows[: -3 * tenth], rows[-3 * tenth : -2 * tenth], rows[-2 * tenth :])
    defaults = {"lr": 0.01, "batch_size": 16, "rank": 8}
    return with_settings(Domain(name, Classification(), data), **(defaults | settings))


def make_run(
    folder: Path,
    tiny_base: Path,
    declared: Domain,
    figures: Callable[[Run], dict[str, Any]] | None = None,
) -> Run:
    """A run built as ``DomainModel.fit`` builds it; ``figures`` replaces its validation."""
    model = model_in(folder, tiny_base)
    dataset = model.dataset(declared)
    plan = make_plan(model.base, dataset)
    run = fit.make_run(model.bank, dataset, plan, model.out, model.display)
    if figures is not None:
        run.validation.figures = partial(figures, run)  # type: ignore[method-assign]
    return run


def digest(folder: Path) -> str:
    return sha256((folder / "spam" / WEIGHTS).read_bytes()).hexdigest()


def fixed(*losses: float, scores: Sequence[float] = ()) -> Callable[[Run], dict[str, Any]]:
    """Validation figures with these losses, and scores, epoch after epoch."""

    def figures(run: Run) -> dict[str, Any]:
        epoch = run.state.epoch
        score = scores[epoch] if scores else -losses[epoch]
        return {"validation_loss": losses[epoch], "accuracy": 0.5, "score": score,
                "higher_is_better": True}  # fmt: skip

    return figures


def stopped_after(steps: int, declared: Domain, folder: Path, tiny_base: Path) -> None:
    """Train until ``steps`` are finished, then stop as Ctrl-C does."""
    run = make_run(folder, tiny_base, declared, None)
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
    declared = domain(clear_rows()[:200], epochs=2, **({"lr": 0.02} | settings))
    card = model_in(folder, tiny_base).fit(declared)
    record: dict[str, Any] = card.adapter.training
    return record
