"""A domain: the declaration of an adapter. It needs no torch and reads no rows.

Domain(
    name="medical", task=Classification(text="note", label="triage", positive="urgent"),
    data=Data("train.csv", test="test.csv"),
    gates=Gates(recall=0.80),
)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from lora_domains.atomic import check_name
from lora_domains.data.source import Data, data_of, data_record
from lora_domains.errors import DomainError, UsageError, did_you_mean, listed
from lora_domains.schema import known_here, load_declaration, load_declarations
from lora_domains.tasks import Task, hashed_record, task_from_record, task_record
from lora_domains.tasks.answers import Judge
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.metrics import METRICS, reported

RETENTION = ["auto", "replay", "kl", "none"]
"""Retention methods by name; ``training.retention`` defines them and appends others."""
JUDGE = "judge"
"""The metric of the scores that a program gives."""
BALANCE = ("weights", "batches")
"""How rare classes may count as much as others: in the loss, or by how often they are drawn."""
EPOCHS = 8
"""Passes over the training rows of a small domain."""
OPTIMIZERS = ("adamw", "adamw8bit")
"""AdamW, and bitsandbytes' with a state of 8 bits."""
SCHEDULES = ("linear", "cosine", "constant", "wsd")
"""How the learning rate goes on after the warm-up (``training.plan.Schedule``)."""
NEWER = ("lr_ratio", "optimizer", "general_cost", "max_steps", "validate_every", "balance",
         "schedule", "decay", "dora", "top_layers")  # fmt: skip
"""Settings that digests are older than: one counts where it is set."""


@dataclass(frozen=True)
class Lora:
    """Shape of the adapter, in the words of PEFT's ``LoraConfig``; None is derived by the plan."""

    rank: int | None = None
    alpha: int | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    """Learn the lengths of the weights' rows, too (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    top_layers: int | None = None
    """Adapt the last layers of the base alone, so many of them; None adapts all."""


@dataclass(frozen=True)
class Training:
    """Training settings; what is None is derived."""

    epochs: int | None = None
    """Most passes over the training rows; None is derived from their number (``training.plan``)."""
    max_steps: int | None = None
    """Most optimiser steps, whatever the epochs."""
    validate_every: int | None = None
    """Steps between validations within an epoch; None is derived. Its end is always validated."""
    lr: float | None = None
    lr_ratio: float | None = None
    """The rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354); None is 1."""
    optimizer: str | None = None
    """One of ``OPTIMIZERS``; None is "adamw"."""
    batch_size: int | None = None
    """Rows in one optimiser step, over all processes."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises; then it follows the schedule."""
    schedule: str | None = None
    """One of ``SCHEDULES``: "wsd" is constant and falls at the end. None is "linear"."""
    decay: float | None = None
    """Share of the steps in which the rate falls to zero at the end, of "wsd" (None is 0.2) and of
    runs that patience stops: they go on from the best epoch so. None: they end at once."""
    weight_decay: float = 0.0
    clip: float = 1.0
    patience: int = 3
    """Epochs without a better validation score before stopping."""
    balance: str | None = None
    """How rare classes count as much as others, one of ``BALANCE``; None: as often as they are."""
    retention: str = "auto"
    """How general knowledge is kept: one of ``RETENTION``; the plan chooses for ``auto``."""
    kl: float = 0.5
    """Weight of the KL divergence from the base on general text, per token."""
    replay: float = 0.25
    """Share of each step's rows that is general text, with replay."""
    general_rows: int = 6
    """General texts in each step that reads any, at most, with KL."""
    general_cost: float | None = None
    """The most that general text adds to the cost of training on the rows alone: where a step would
    add more, it reads fewer, or is one of several without any. None is 0.4, and on the embedded
    base no limit."""
    max_length: int | None = None
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory for about a third more time."""
    seed: int = 0


@dataclass(frozen=True)
class Domain:
    """Name, task, data, LoRA and training settings, and gates of an adapter.

    Raises DomainError for an unsafe name or a setting out of range.
    """

    name: str
    task: Task
    data: Data
    lora: Lora = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    gates: Gates = field(default_factory=Gates)
    show_text: bool = False
    """Whether cards and reports may contain row text; for public rows only."""
    metric: str | None = None
    """The metric that decides, one of ``metrics_of`` the task; None is the task's own."""
    prevalence: float | None = None
    """The share of positives where the adapter will be used, at which precision is restated."""
    judge: Judge | None = None
    """A program that also judges the generated answers; it reads the text of the rows."""

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_metric(self)
        try:
            _check_ranges(self)
        except TypeError as error:
            raise DomainError(
                where=f"domain {self.name!r}",
                expected="numbers where settings are numbers",
                found=str(error),
                hint="Omit the setting for its default.",
            ) from None

    @property
    def primary_metric(self) -> str:
        """The metric that decides whether an adapter gained, and that ranks its epochs."""
        return self.metric or self.task.metric

    @property
    def declared_metric(self) -> str:
        """The metric that decides; of a judge, which one and by what range."""
        if self.primary_metric != JUDGE or self.judge is None:
            return self.primary_metric
        return f"{JUDGE} {sorted(self.judge.record().items())}"

    @property
    def thresholds(self) -> dict[str, Any]:
        """The thresholds by gate. ``target_recall`` is also the floor of the gate on recall, unless
        ``gates`` sets a floor other than the default; likewise ``target_precision``."""
        own, default = self.gates.record(), Gates().record()
        floors = {name: target for name, target in self.task.targets.items()
                  if own[name] == default[name]}  # fmt: skip
        return own | floors

    def check_judge(self) -> None:
        """Try the judge, where there is one. Raises JudgeError where it does not work, UsageError
        where the metric needs one or the task has no answers to judge."""
        judges = metrics_of(self.task)
        if self.judge is None and self.primary_metric == JUDGE:
            expected, found = "a program that judges, for the metric judge", "none"
            hint = "Give it: --judge COMMAND, or Domain(judge=Judge(…))."
        elif self.judge is not None and JUDGE not in judges:
            expected, found = "a task whose answers are generated, for a judge", self.task.kind
            hint = "Answers of a chat are generated with --generate."
        else:
            return self.judge.check() if self.judge else None
        raise UsageError(where=f"domain {self.name!r}", expected=expected, found=found, hint=hint)

    def digest(self) -> str:
        """sha256 of the declaration. A file counts by its name, rows in memory by their number.

        The judge does not count: it changes nothing that is trained.
        """
        data = data_record(self.data, lambda path: Path(path).name)
        # A floor that is the target says the same as none.
        default = {name: getattr(Gates(), name) for name, target in self.task.targets.items()
                   if getattr(self.gates, name) == target}  # fmt: skip
        task, gates = _json(hashed_record(self.task)), replace(self.gates, **default).hashed()
        hashed = {"name": self.name, **as_record(self), "task": task, "data": data, "gates": gates}
        hashed["lora"] = {k: v for k, v in hashed["lora"].items() if k not in NEWER or v}
        training = {k: v for k, v in hashed["training"].items() if k not in NEWER or v is not None}
        # Digests are older than deriving the epochs, too.
        hashed["training"] = training | {"epochs": self.training.epochs or EPOCHS}
        newer = {"metric", "prevalence"}  # than digests
        hashed = {k: v for k, v in hashed.items() if k not in newer or v is not None}
        return sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def metrics_of(task: Task) -> list[str]:
    """The metrics by which an adapter for ``task`` can be judged."""
    # Whether there are labels, and a positive one, is enough: which ones may be unknown yet.
    labels = task.labels or (("",) if task.has_labels else ())
    positive = None if task.positive is None else 0
    return [m.name for m in reported(labels, positive) if task.score_keys.issuperset(m.scores)]


def _check_metric(domain: Domain) -> None:
    """Raise DomainError for a metric that is unknown, or that the task cannot give."""
    metric, available = domain.metric, metrics_of(domain.task)
    if metric is None or metric in available:
        return
    hint = "Choose one of these, or leave it out."
    if metric not in METRICS:
        hint = did_you_mean(metric, available)
    elif domain.task.has_labels and not METRICS[metric].applies(("",), None):
        hint = "Name the positive class (positive=… or --positive), or choose one of these."
    raise DomainError(
        where=f"domain {domain.name!r}, setting 'metric'",
        expected=f"a metric of {domain.task.kind.replace('_', ' ')}: {listed(available)}",
        found=repr(metric),
        hint=hint,
    )


def _check_ranges(domain: Domain) -> None:
    lora, training, task, top = domain.lora, domain.training, domain.task, domain.lora.top_layers
    batch, length, share = training.batch_size, training.max_length, domain.prevalence
    decay, clip, kl, how = training.weight_decay, training.clip, training.kl, training.balance
    cost, epochs, steps = training.general_cost, training.epochs, training.max_steps
    every, ratio, optimizer = training.validate_every, training.lr_ratio, training.optimizer
    schedule, falls = training.schedule, training.decay
    balances = task.has_labels and (how != "weights" or task.head or task.outputs == "classes")
    allowed = f"{listed(BALANCE)} of a task with labels; weights of several need a head"
    positives = "a share of positives between 0 and 1, of a task with a positive class"
    rules: list[tuple[str, Any, bool, str]] = [
        ("rank", lora.rank, lora.rank is None or 1 <= lora.rank <= 1024, "1 to 1024"),
        ("alpha", lora.alpha, lora.alpha is None or lora.alpha > 0, "above 0"),
        ("dropout", lora.dropout, 0 <= lora.dropout < 1, "0 up to, not including, 1"),
        ("top_layers", top, top is None or top >= 1, "at least 1"),
        ("epochs", epochs, epochs is None or epochs >= 1, "at least 1"),
        ("max_steps", steps, steps is None or steps >= 1, "at least 1"),
        ("validate_every", every, every is None or every >= 1, "at least 1 step"),
        ("lr", training.lr, training.lr is None or 0 < training.lr < 1, "above 0, below 1"),
        ("batch_size", batch, batch is None or batch >= 1, "at least 1"),
        ("lr_ratio", ratio, ratio is None or 0 < ratio <= 1000, "above 0, at most 1000"),
        ("optimizer", optimizer, optimizer in (None, *OPTIMIZERS), listed(OPTIMIZERS)),
        ("schedule", schedule, schedule in (None, *SCHEDULES), listed(SCHEDULES)),
        ("schedule", schedule, not falls or schedule != "constant", "wsd, which also decays"),
        ("decay", falls, falls is None or 0 < falls < 1, "above 0, below 1"),
        ("seed", training.seed, 0 <= training.seed < 2**31, "0 up to 2147483647"),
        ("weight_decay", decay, 0 <= decay < inf, "0 or above, and finite"),
        ("max_length", length, length is None or length >= 8, "at least 8 tokens"),
        ("warmup", training.warmup, 0 <= training.warmup < 1, "0 up to, not including, 1"),
        ("patience", training.patience, training.patience >= 1, "at least 1"),
        ("retention", training.retention, training.retention in RETENTION, listed(RETENTION)),
        ("balance", how, how is None or (balances and how in BALANCE), allowed),
        ("kl", kl, 0 < kl < inf, "above 0, and finite (retention='none' trains without it)"),
        ("replay", training.replay, 0 < training.replay <= 0.9, "above 0, at most .9"),
        ("general_rows", training.general_rows, training.general_rows >= 1, "at least 1"),
        ("general_cost", cost, cost is None or 0 < cost < inf, "above 0, and finite"),
        ("clip", clip, 0 < clip < inf, "above 0, and finite"),
        ("prevalence", share, share is None or (0 < share < 1 and bool(task.positive)), positives),
        *domain.gates.ranges(),
    ]
    for name, value, holds, allowed in rules:
        if not holds:
            raise DomainError(
                where=f"domain {domain.name!r}, setting {name!r}",
                expected=allowed,
                found=repr(value),
                hint="Change it in the recipe or on the command line.",
            )


PARTS = ("training", "lora", "gates", "task")
"""The parts of a domain that hold settings."""


def with_settings(domain: Domain, **settings: Any) -> Domain:
    """``domain`` with its metric, prevalence, or settings of its parts changed.

    A setting of the training, LoRA or gates goes by its name (``lr``), any by that of its part too
    (``training.lr``, ``task.label``). ``retention`` alone is the training method; the margin of the
    gate is ``gates.retention``. Raises UsageError for an unknown name.
    """
    known = {name.rpartition(".")[2]: name for name in reversed(setting_types(domain))
             if not name.startswith("task.")}  # fmt: skip
    whole = {name: settings.pop(name) for name in ("metric", "prevalence") if name in settings}
    changes: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, value in settings.items():
        part, _, field_name = known.get(name, name).rpartition(".")
        if part not in changes or (part != "task" and field_name not in known):
            names = {*known, "metric", "prevalence"}
            raise UsageError(
                expected="a setting of a domain",
                found=repr(name),
                hint=did_you_mean(name, names, known_here(name, names)),
            )
        changes[part][field_name] = value
    task = changes.pop("task")
    changed = {part: replace(getattr(domain, part), **new) for part, new in changes.items()}
    if task:
        changed["task"] = domain.task.with_options(**task)
    return replace(domain, **changed, **whole)


def setting_types(domain: Domain) -> dict[str, Any]:
    """The type of every setting in the parts of ``domain``, by names such as ``training.lr``."""
    types: dict[str, Any] = {}
    for part in PARTS:
        value = getattr(domain, part)
        hints = get_type_hints(type(value))
        types |= {f"{part}.{setting.name}": hints[setting.name] for setting in fields(value)}
    return types


def load_domain(path: str | Path) -> Domain:
    """The ``domain`` declared in a recipe; ``if __name__ == "__main__"`` in it does not run."""
    return load_declaration(path, "domain", Domain)


def load_domains(paths: Sequence[str | Path]) -> list[Domain]:
    """The domains of several recipes, each once: ``domain``, or all of a list ``domains``."""
    found = [one for path in paths for one in load_declarations(path, "domain", Domain)]
    return list({(one.name, one.digest()): one for one in found}.values())


def as_record(domain: Domain) -> dict[str, Any]:
    """The settings of a card, as JSON without any row; ``digest`` hashes the same keys.

    Renaming a class changes no key; the fields of a task and of gates list their former names in
    ``renamed``. Files in or under the working folder are relative to it; other files are given by
    name only.
    """
    return {
        "task": _json(task_record(domain.task)),
        "data": data_record(domain.data, _relative),
        "lora": _json(asdict(domain.lora)),
        "training": _json(asdict(domain.training)),
        "gates": domain.thresholds,
        "show_text": domain.show_text,
        "metric": domain.metric,
        "prevalence": domain.prevalence,
    }


def domain_from(
    name: str, settings: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None
) -> Domain:
    """The domain of ``as_record``, with the rows ``given`` for a split in place of those that it
    has; undeclared labels are read from its rows again.

    Raises UsageError where ``settings``, those at ``where``, lack a part: code of a recipe, rows in
    memory, or what is not known of an adapter that others trained.
    """
    if "training" not in settings:
        expected, found = (
            "an adapter that was trained here",
            "one of plain PEFT, whose card holds its evaluation only",
        )
        hint = "Its training rows and settings are unknown; train one on rows of your own."
    elif own := sorted(settings["gates"].keys() - {field.name for field in fields(Gates)}):
        expected, found = "gates of this package", f"those of a recipe: {listed(own)}"
        hint = "Run the recipe with the same flags, since a card holds no code."
    elif (method := settings["training"]["retention"]) not in RETENTION:
        expected = f"a retention method of this version: {listed(RETENTION)}"
        found = f"{method}, of an older version"
        hint = "Train the adapter again with --retention replay or kl."
    else:
        lora, whole = settings["lora"], {k: settings.get(k) for k in ("metric", "prevalence")}
        targets = lora["targets"] if isinstance(lora["targets"], str) else tuple(lora["targets"])
        return Domain(
            name, task_from_record(settings["task"]), data_of(settings.get("data"), where, given),
            Lora(**lora | {"targets": targets}), Training(**settings["training"]),
            Gates(**settings["gates"]), settings["show_text"], **whole,
        )  # fmt: skip
    raise UsageError(where=where, expected=expected, found=found, hint=hint)


def _relative(path: str | Path) -> str:
    """``path`` relative to the working folder; the name of a file outside it."""
    absolute, here = Path(path).expanduser().absolute(), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else absolute.name


def _json(value: Any) -> Any:
    """``value`` as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))
