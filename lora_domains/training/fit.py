"""The steps of one fit: plan, train with checkpoints, save the adapter with its card; trackers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.folder import find_adapter
from lora_domains.adapters.parent import Parent, continued_task, find_parent, load_parent
from lora_domains.adapters.peft import save_adapter
from lora_domains.adapters.readme import readme
from lora_domains.adapters.versions import keep_version
from lora_domains.console import Display, phases_in_words, spread
from lora_domains.data.identity import open_project
from lora_domains.data.leaks import trained_rows
from lora_domains.data.prepare import Prepared
from lora_domains.dataset import Dataset, load_dataset
from lora_domains.distributed import environment
from lora_domains.domain import Domain, as_record
from lora_domains.errors import OutOfMemory, UsageError, check_installed, did_you_mean, number_of
from lora_domains.inference.cache import cache_limit
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import FEATURES
from lora_domains.placement import check_trainable
from lora_domains.probes.general_text import POOL, SELECTION
from lora_domains.report.card import AdapterEntry, BaseRecord, Card, ParentRecord
from lora_domains.training.checkpoints import RunCheckpoint, checkpoint_path, read_checkpoint
from lora_domains.training.estimate import Estimate, estimate
from lora_domains.training.loop import Log, Run, Trained
from lora_domains.training.plan import Plan, make_plan
from lora_domains.training.validation import SAMPLES, collapse_warning

TRACKERS = ("tensorboard", "wandb", "trackio")
LOGS = ".runs"
"""Folder under the output folder for trackers that write files."""

PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
"""Settings of wandb. Without them it sends the command with its file names, the output, the host,
its packages and the code."""


def training_dataset(
    domain: Domain,
    base: Base,
    out: Path,
    display: Display,
    *,
    init_from: str | Path | None = None,
    resume: bool = False,
    prepared: Prepared | None = None,
) -> Dataset:
    """The rows of ``domain``, with the adapter ``init_from`` as the parent from which to continue.

    Raises DataError or LeakError for rows that cannot be used, AdapterError for such a parent, and
    UsageError for a base with layers in memory or on the disk.
    """
    check_trainable(base.model, base.id)
    if init_from is None:
        return load_dataset(domain, base, display, prepared)
    parent = load_parent(find_adapter(init_from, out), base)
    domain = replace(domain, task=continued_task(parent.adapter, domain.task))
    dataset = load_dataset(domain, base, display, prepared)
    if resume:
        parent = resumed_parent(parent, dataset, base, out)
    return replace(dataset, parent=parent)


def check_launch(tracker: str | None, display: Display) -> None:
    """Raise UsageError for a tracker that cannot be used; warn of what the launcher cannot do.

    Called before rows are read, which may take long.
    """
    cache_limit()  # a variable that is no number
    if tracker is not None:
        check_tracker(tracker)
    for warning in distributed.launch_warnings():
        display.warn(warning)


def estimated(
    bank: Bank, dataset: Dataset, out: Path, display: Display, evaluation: Callable[[str], float]
) -> Estimate:
    """A dry run of ``fit``: nothing is trained, and an estimate of the whole run is shown.

    ``evaluation`` gives the seconds of evaluating an adapter by its name.
    """
    dataset = replace(dataset, general=dataset.general.in_part())
    plan = shown_plan(bank.base, dataset, display)
    run = make_run(bank, dataset, plan, out, display)
    found = estimate(run, evaluation, dataset.general.seconds)
    display.stage("estimate", None, None, found.in_words())
    steps = f"{number_of(plan.epochs, 'epoch')} of {number_of(plan.steps_per_epoch, 'step')}"
    if plan.max_steps is not None:
        steps = number_of(plan.steps, "step")
    display.line(f"Dry run: {steps} would follow; nothing was trained or written.")
    return found


def fit(
    bank: Bank,
    dataset: Dataset,
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    tracker: str | None = None,
) -> Card:
    """Train an adapter on ``dataset`` and save it in ``out``; its card.

    The bank is as it was before. Raises DataError or TrainingError; when an epoch was finished, the
    best one is saved first.
    """
    domain, plan = dataset.domain, shown_plan(bank.base, dataset, display)
    rows = distributed.on_main(lambda: remembered(dataset))
    if checkpoint_path(out, domain.name).exists() and not resume:
        display.warn("an unfinished run is replaced; --resume would have continued it.")
    with ExitStack() as stack:
        log: Log | None = None
        if tracker is not None:
            log, close = open_tracker(tracker, domain.name, out, plan.numbers())
            stack.callback(close)
        run = make_run(bank, dataset, plan, out, display, log)
        run.on_best = lambda trained: save(bank.base, dataset, trained, out, rows, finished=False)
        try:
            trained = run.fit(resume=resume)
        except OutOfMemory as error:
            save_best(error, [run])
            raise
    card = save(bank.base, dataset, trained, out, rows)
    run.forget()
    show_outcome(dataset, plan, trained, display)
    return card


def save_best(error: OutOfMemory, runs: Sequence[Run]) -> None:
    """Save the best epochs of ``runs`` before they end by ``error``, whose hint then says so.

    One of several processes cannot do that alone, and others may have enough memory.
    """
    if distributed.state().num_processes == 1:
        error.hint = " ".join([error.hint, *(run.save_best() for run in runs)])


def shown_plan(
    base: Base, dataset: Dataset, display: Display, shown: set[str] | None = None
) -> Plan:
    """The plan of a run, which is shown with its warnings but for what was ``shown`` before."""
    plan, known = make_plan(base, dataset), set() if shown is None else shown
    for reason in plan.reasons:
        if reason not in known:
            display.stage("plan", None, None, reason)
            known.add(reason)
    for warning in plan.warnings:
        display.warn(warning)
    return plan


def show_outcome(dataset: Dataset, plan: Plan, trained: Trained, display: Display) -> None:
    """Show what a run came to."""
    record = trained.record
    best = next(one for one in record["history"] if one["epoch"] == record["best_epoch"])
    if collapsed := collapse_warning(best, plan.lr):
        display.warn(collapsed)
    display.stage(
        "fine-tuned",
        len(dataset.train),
        None,
        f"{number_of(record['epochs'], 'epoch')}, {number_of(record['steps'], 'step')}, "
        f"{record['seconds']:.0f} s "
        f"({phases_in_words(record['phases'])}; {record['tokens_per_second']:,.0f} tokens/s); "
        f"epoch {record['best_epoch']} kept",
    )


def make_run(
    bank: Bank,
    dataset: Dataset,
    plan: Plan,
    out: Path,
    display: Display,
    log: Log | None = None,
) -> Run:
    """The training run of ``dataset``; its adapter is added to ``bank``."""
    domain, base = dataset.domain, bank.base
    if not base.language_head and domain.training.retention != "none":
        display.warn(
            f"{base.id} has no masked-token head: the adapter is not regularised towards it; "
            "linear probes of its features measure what it keeps."
        )
    texts, tokenization = dataset.general, dataset.tokenization
    run = Run(
        bank,
        domain,
        plan,
        [row.encoded for row in dataset.train],
        [row.encoded for row in dataset.validation],
        RunCheckpoint(checkpoint_path(out, domain.name), display),
        display,
        general=texts.windows("training", tokenization, min(POOL, plan.general_reads)),
        monitored=texts.windows("selection", tokenization, SELECTION),
        predictions=texts.predictions,
        parent=dataset.parent,
        log=log,
    )
    if domain.show_text and domain.task.max_new_tokens:
        run.validation.samples = spread(dataset.validation, SAMPLES)
    return run


def remembered(dataset: Dataset) -> dict[str, str]:
    """What the card remembers of the training and validation rows, and of those of the parent."""
    card = dataset.parent.adapter.card if dataset.parent else None
    parent = card.adapter.trained_rows if card else {}
    if dataset.parent and not parent:
        return {}
    _, key = open_project()
    prepared = dataset.prepared
    return trained_rows([*prepared.train, *prepared.validation], key, parent)


def save(
    base: Base,
    dataset: Dataset,
    trained: Trained,
    out: Path,
    rows: dict[str, str],
    finished: bool = True,
) -> Card:
    """Write the adapter's folder in ``out``; the main process writes, the others wait.

    ``rows`` is what its card remembers of the rows. Returns the card. An adapter of that name
    becomes a version first.
    """
    domain, folder, head = dataset.domain, out / dataset.domain.name, trained.adapter.head
    entry = AdapterEntry(
        domain=domain.name,
        path=domain.name,
        sha256=None,
        recipe_digest=domain.digest(),
        parent=dataset.parent.record() if dataset.parent else None,
        pooling=head.layout.pooling if head and head.layout.task == FEATURES else None,
        chat=dataset.chat,
        settings=as_record(domain),
        data=dict(dataset.prepared.digests),
        trained_rows=rows,
        training=trained.record | {"finished": finished},
        ledger=asdict(dataset.prepared.row_counts),
        leaks=asdict(dataset.prepared.leaks),
    )

    def signed(sha256: str) -> Card:
        return Card(
            base=BaseRecord(**base.record()),
            environment=environment(base.device, base.quantization, domain.training.seed),
            adapter=replace(entry, sha256=sha256),
        )

    def write() -> Card:
        # First, since the parent may have the same name.
        keep_version(folder, successor=entry)
        save_adapter(folder, trained.adapter, base, signed, readme)
        return Card.read(folder)

    return distributed.on_main(write)


def resumed_parent(parent: Parent, dataset: Dataset, base: Base, out: Path) -> Parent:
    """The adapter from which an interrupted run began; ``parent`` where that is unknown.

    The run may have replaced its parent meanwhile, if both have one name, even with a finished
    adapter when only the evaluation was interrupted.
    """
    began = _began_from(dataset, parent.adapter.card, out)
    if began in (None, parent.sha256):
        return parent
    record = ParentRecord(parent.adapter.name, str(began))
    return find_parent(record, base, out) or parent


def _began_from(dataset: Dataset, card: Card | None, out: Path) -> str | None:
    """sha256 of the adapter from which the run of ``dataset`` began, if it is known."""
    domain = dataset.domain
    stored = read_checkpoint(checkpoint_path(out, domain.name))
    if stored is not None:
        parent: str | None = stored["run"].get("parent")
        return parent
    if card is None or card.adapter.parent is None:
        return None
    entry = card.adapter
    own = (domain.name, domain.digest(), dict(dataset.prepared.digests))
    same_run = (entry.domain, entry.recipe_digest, entry.data) == own
    return card.adapter.parent.sha256 if same_run else None


# ── Trackers ────────────────────────────────────────────────────────────────────────────────────
#
# Through Accelerate: only numbers and numeric settings are logged, by name; no row, file name or
# prediction. No service is contacted unless a tracker is requested.


def check_tracker(name: str) -> None:
    """Raise UsageError unless ``name`` is a supported tracker and installed."""
    if name not in TRACKERS:
        raise UsageError(
            where="--tracker",
            expected="one of " + ", ".join(TRACKERS),
            found=repr(name),
            hint=did_you_mean(name, TRACKERS),
        )
    # Accelerate takes either of two packages for TensorBoard; the extra has the second one.
    package = name if name != "tensorboard" or find_spec(name) else "tensorboardX"
    check_installed("--tracker", f"the package {package}", name, [package])


def open_tracker(
    name: str, domain: str, out: Path, settings: Mapping[str, Any]
) -> tuple[Log, Callable[[], None]]:
    """The functions (log, close) of one run; ``settings`` are numbers by name."""
    from accelerate import Accelerator

    folder = out / LOGS
    accelerator = Accelerator(log_with=name, project_dir=str(folder))
    own = {"wandb": {"dir": str(folder), "settings": PRIVATE}}
    accelerator.init_trackers(domain, config=dict(settings), init_kwargs=own)

    def log(values: Mapping[str, Any], step: int) -> None:
        accelerator.log(numbers(values), step=step)

    def close() -> None:
        # Not end_training(): it destroys the process group, which the evaluation still needs.
        if accelerator.is_main_process:
            for tracker in accelerator.trackers:
                tracker.finish()

    return log, close


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, without texts, booleans and missing values."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
