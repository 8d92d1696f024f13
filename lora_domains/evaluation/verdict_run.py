"""One evaluation of an adapter: score its test rows, record that in the ledger, apply its gates.

Every verdict on test rows comes from ``judge``, so that no evaluation is missing from the ledger
and each keeps to the budget of its test rows (``verdict.ledger``).
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.folder import own_folder, rewrite_card
from lora_domains.adapters.foreign import foreign_card, is_foreign, save_evaluation
from lora_domains.adapters.parent import loaded_parent
from lora_domains.adapters.readme import readme
from lora_domains.console import EVALUATION, Clock, Display
from lora_domains.data.identity import (
    FOLDER,
    digest_key,
    keyed_digest,
    normalised_once,
    open_project,
    row_digest,
)
from lora_domains.data.prepare import Prepared
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, as_record
from lora_domains.errors import AdapterCorrupt, AdapterError, UsageError
from lora_domains.evaluation.contenders import score_adapter, score_validation
from lora_domains.evaluation.items import Items, make_items
from lora_domains.evaluation.leak_search import OWN_SUITES, leaks_of, with_inherited
from lora_domains.evaluation.scorer import Scorer, TimedScorer
from lora_domains.inference.predict import length_of
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import check_head
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry, Card, read_items
from lora_domains.report.report import figures
from lora_domains.tasks import Task
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.ledger import (
    RowSet,
    Standing,
    Subject,
    begin_evaluation,
    digest_of_rows,
    end_evaluation,
    standing,
)
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import every_metric

OLD_LEDGER = ".looks.jsonl"


@normalised_once()
def evaluate(
    bank: Bank,
    dataset: Dataset,
    suite: Suite,
    out: Path,
    display: Display,
    base_changed: Callable[[], bool],
) -> Card:
    """Score the adapter of the dataset's domain, apply its gates and rewrite its card.

    ``out`` holds the key of the rows' digests. ``base_changed`` is called once everything is
    scored. Returns the card; that of an adapter which others trained is saved in ``out``. Raises
    UsageError for other training rows than the adapter was trained on.
    """
    name, card = dataset.domain.name, _checked_card(bank, dataset, display)
    entry, path = card.adapter, bank[name].path
    place = own_folder(path, out / name) if path and not entry.trained_elsewhere else None
    leaks = leaks_of(dataset, suite, bank.base, elsewhere=entry.trained_elsewhere)
    leaks = with_inherited(leaks, entry, dataset, display)
    evaluated = Evaluated(dataset, entry, suite, bank.base, out)
    evaluated.announce(display)
    key, scorer = distributed.on_main(lambda: digest_key(out)), Scorer(bank, display)
    continued_from = loaded_parent(bank, name, dataset.parent, out, display.warn)
    with continued_from as parent:
        items, judged = score_adapter(scorer, dataset, suite, name, key, parent)
    use_settings(entry, dataset.domain)
    entry.leaks, entry.chat = leaks, dataset.chat
    entry.judged = {**judged, "base_changed": base_changed()}
    if path is not None and not dataset.domain.task.tuned:
        items += _validation_items(path)
    judge(entry, items, evaluated)
    if entry.trained_elsewhere:
        saved = distributed.on_main(lambda: save_evaluation(bank[name], out, card, readme, items))
        display.line(f"Its card and items: {saved}")
    elif path is not None:
        distributed.on_main(lambda: rewrite_card(path, card, readme, items, place))
    return card


@normalised_once()
def evaluation_seconds(
    bank: Bank,
    dataset: Dataset,
    suite: Suite,
    name: str,
    base_changed: Callable[[], bool],
    *,
    test: bool,
) -> float:
    """An estimate of how long it takes to evaluate an adapter like ``name``, in seconds.

    Parts of the rows are scored by the adapter as it is, and nothing is kept. Without ``test`` it
    is the time of ``validation_scores``.
    """
    domain, spent = dataset.domain, dict[str, float]()
    scorer = TimedScorer(bank, Display(quiet=True))
    with Clock(spent).phase(EVALUATION), ExitStack() as stack:
        if not test:
            with distributed.sharing():
                contenders = score_validation(scorer, dataset, [name])[name]
            _figures(make_items("validation", dataset.validation, contenders, b""), domain.task)
        else:
            leaks = leaks_of(dataset, suite, bank.base, elsewhere=False)
            parent = None
            if dataset.parent is not None:
                parent = f"{name}__parent"
                bank.add(replace(dataset.parent.adapter, name=parent))
                stack.callback(bank.remove, parent)
            items, judged = score_adapter(scorer, dataset, suite, name, b"", parent)
            judged["base_changed"] = base_changed()
            settings = as_record(domain)
            figures(AdapterEntry(domain=domain.name, path=domain.name, sha256=None, leaks=leaks,
                                 settings=settings, judged=judged), items)  # fmt: skip
    return spent[EVALUATION] + scorer.unspent


def validation_scores(
    bank: Bank, dataset: Dataset, out: Path, display: Display
) -> dict[str, dict[str, Any]]:
    """Base, adapter and baselines of the dataset's domain on the rows that chose its epoch.

    By metric, as ``domain_scores`` of a card. No test row is scored, and the ledger records
    nothing. The scores of the rows are stored with the adapter, so that seeds can be compared.
    ``out`` holds the key of their digests.
    """
    domain, adapter = dataset.domain, bank[dataset.domain.name]
    key = distributed.on_main(lambda: digest_key(out))
    with distributed.sharing():
        own = score_validation(Scorer(bank, display), dataset, [domain.name])[domain.name]
    items = make_items("validation", dataset.validation, own, key, domain.show_text)
    path, card = adapter.path, adapter.card
    if path is not None and card is not None:
        distributed.on_main(lambda: rewrite_card(path, card, readme, items))
    return _figures(items, domain.task)


def _figures(items: Items, task: Task) -> dict[str, dict[str, Any]]:
    return every_metric(ScoreTable(items), task.labels or (), task.positive_index)


def _validation_items(folder: Path) -> Items:
    """The items that ``validation_scores`` stored with the adapter in ``folder``, if any."""
    try:
        return [item for item in read_items(folder) if item["set"] == "validation"]
    except AdapterCorrupt:  # no file, or a damaged one, which the evaluation replaces
        return []


def _checked_card(bank: Bank, dataset: Dataset, display: Display) -> Card:
    """The card of the dataset's adapter; raises an error unless ``dataset`` fits its training."""
    name = dataset.domain.name
    card = bank[name].card
    if card is None or is_foreign(bank[name]):
        return foreign_card(bank[name], bank.base, dataset.domain, dataset.prepared)
    check_fits(bank, name, card.adapter, dataset, display)
    return card


def use_settings(entry: AdapterEntry, domain: Domain) -> None:
    """Give ``entry`` the task, gates and metric of ``domain``; those at training are kept."""
    now = {key: as_record(domain)[key] for key in ("task", "gates", "metric", "prevalence")}
    before = {key: entry.settings.get(key) for key in now}
    if before != now and not entry.trained_with:
        entry.trained_with = before
    entry.settings |= now


def check_fits(
    bank: Bank, name: str, entry: AdapterEntry, dataset: Dataset, display: Display
) -> None:
    """Raise an error unless classes, training rows and their length are those of the training of
    the adapter ``name``; warn of other prompts or general text."""
    if entry.chat != dataset.chat:
        display.warn(f"prompts are rendered otherwise than in the training of {name}.")
    check_head(bank[name].head, dataset.domain.task, entry.declared_task, name)
    check_same_rows(name, entry, dataset.prepared, "train")
    check_same_length(name, length_of(bank, name), dataset.tokenization.max_length)
    if entry.data.get("general") not in (None, dataset.prepared.digests["general"]):
        display.warn(
            f"the general text differs from that in the training of {name}: leaks are searched for "
            "in the text given now."
        )


def check_same_rows(name: str, entry: AdapterEntry, prepared: Prepared, split: str) -> None:
    """Raise UsageError unless ``split`` is what the adapter of ``entry`` was trained with."""
    if entry.data.get(split) != prepared.digests[split]:
        raise UsageError(
            where=name,
            expected=f"the {split} rows of its training: leaks, overfitting, baselines and scales "
            "are measured on them",
            found="other rows, or another split or sample of them",
            hint="Give the rows, the seed and the limit of its training.",
        )


def check_same_length(name: str, trained: int, now: int) -> None:
    """Raise UsageError where rows are truncated at another length than in training."""
    if trained != now:
        raise UsageError(
            where=name,
            expected=f"rows of at most {trained} tokens, as it was trained and is used",
            found=f"at most {now}",
            hint="Give the max_length of its training.",
        )


# ── The ledger of the project ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Evaluated:
    """One adapter on the test rows of a dataset, as the ledger of the project records it.

    Every process may call the methods; the first one reads and writes.
    """

    dataset: Dataset
    entry: AdapterEntry
    suite: Suite
    base: Base
    out: Path
    """The folder of the adapters, where older versions kept a ledger."""
    before: "tuple[Evaluated, ...]" = ()
    """Evaluations that begin before this one does."""

    def announce(self, display: Display) -> None:
        """Show how many evaluations the test rows have left, before anything is scored."""
        now = self.standing()
        if now.may_pass:
            display.stage(
                "test rows", None, None, f"{now} {now.budget - now.number} are left after it."
            )
        else:
            display.warn(str(now))

    def standing(self) -> Standing:
        """The standing that the evaluation would have now, after those before it."""
        return distributed.on_main(
            lambda: standing(*self._recorded, [one._recorded[1:] for one in self.before])
        )

    def begin(self) -> Standing:
        """Record that the evaluation takes place; returns its standing."""
        return distributed.on_main(lambda: begin_evaluation(*self._recorded))

    def end(self, verdict: str) -> None:
        """Record its verdict."""
        distributed.on_main(lambda: end_evaluation(*self._recorded[:3], verdict))

    @cached_property
    def _recorded(self) -> tuple[Path, RowSet, Subject, int]:
        """What the functions of the ledger take. Raises AdapterError for an older ledger."""
        _check_old_ledger(self.out)
        (folder, key), domain = open_project(), self.dataset.domain
        test, scored = _row_sets(self.dataset, key)
        subject = Subject(
            adapter=str(self.entry.sha256),
            domain=domain.name,
            scored=scored,
            declared=declared_by(self.dataset, self.suite, self.base, self.entry),
            asked=asked_by(self.dataset, self.base),
        )
        return folder, test, subject, domain.gates.evaluations


def _row_sets(dataset: Dataset, key: bytes | None) -> tuple[RowSet, str]:
    """The test set from which the test rows were taken, and the digest of the rows themselves."""
    if key is None:
        return RowSet((), None), ""
    digests = [
        {name: row_digest(parts, key) for name, parts in by_text.items()}
        for by_text in dataset.prepared.test_source
    ]
    scored = {digests[0][row.example.id] for row in dataset.test}
    views = dict.fromkeys(frozenset(by_text.values()) for by_text in digests)
    fingerprint = keyed_digest("fingerprint", key)[:8]
    return RowSet(tuple(views), fingerprint), digest_of_rows(scored)


def declared_by(
    dataset: Dataset, suite: Suite, base: Base, entry: AdapterEntry
) -> dict[str, str | int]:
    """What decides a verdict besides the answers, by name (``Subject.declared``).

    The training rows of an adapter that was trained here cannot be others (``check_fits``).
    """
    name = OWN_SUITES[0] if suite.name in OWN_SUITES else suite.name
    given, own = {**dataset.prepared.given}, [] if base.bidirectional else suite.content()
    if not entry.trained_elsewhere:
        general = {k: v for k, v in given.items() if k == "general text"}
        given = {"validation rows": dataset.prepared.digests["validation"][:16], **general}
    return {
        "gates": declaration(dataset.domain),
        "suite": _short_digest([name, *(probe.name for probe in suite.probes), suite.seed]),
        "general questions": 0 if base.bidirectional else len(suite.questions()),
        **({"questions of a file": _short_digest(own)} if own else {}),
        **given,
    }


ASKED = ("chat", "instruction", "thinking", "per_token", "max_new_tokens", "until", "judge",
         "tune_thresholds")  # fmt: skip
"""Settings of tasks that change an answer or how it is compared, and neither columns nor labels."""


def asked_by(dataset: Dataset, base: Base) -> str:
    """Digest of what the answers depend on besides the adapter and the row (``Subject.asked``).

    The prompt, how an answer is read, the length at which a row is cut, the base, and the seed,
    which draws the examples of the few-shot baseline. Labels count where a head has them, by their
    order; elsewhere the training rows may name more of them.
    """
    task, record = dataset.domain.task, as_record(dataset.domain)["task"] | dataset.chat
    labels = list(zip(task.labels or (), task.label_texts, strict=False))
    return _short_digest(
        [
            task.kind,
            task.template,
            task.answer_column,
            labels if task.head else [pair for pair in labels if pair[0] != pair[1].strip()],
            {k: v for k, v in record.items() if k in ASKED and (v or k != "thinking")},
            dataset.tokenization.max_length,
            base.identity,
            dataset.domain.training.seed,
        ]
    )


def _short_digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def declaration(domain: Domain) -> str:
    """Digest of the metric, the gates, and the rows that count together.

    Gates are covered where they differ from their defaults, so that a new one changes nothing. The
    number of evaluations is fixed by the test set instead.
    """
    defaults = Gates().record()
    declared = {
        "metric": domain.declared_metric,
        "positive": domain.task.positive,
        "targets": domain.task.targets,
        "group": domain.data.group,
        "slices": sorted(domain.data.slices),
        "gates": {
            name: value
            for name, value in domain.thresholds.items()
            if name != "evaluations" and value != defaults.get(name)
        },
    }
    return _short_digest(declared)


def _check_old_ledger(out: Path) -> None:
    """Raise AdapterError for the ledger of an older version, whose rows cannot be recognised."""
    if (out / OLD_LEDGER).exists():
        raise AdapterError(
            where=str(out / OLD_LEDGER),
            expected=f"a ledger of evaluations in {FOLDER} of the project",
            found="one of an older version, whose test rows cannot be recognised",
            hint="The test rows in it have been evaluated before: collect new ones, then delete "
            "it with .looks.head.",
        )


def judge(entry: AdapterEntry, items: Items, evaluated: Evaluated) -> None:
    """Figures, gates and verdict of ``entry`` from ``items`` that were just scored.

    The ledger is written before and after: an evaluation that is stopped in between counts all the
    same. Every process calls this; the first one writes.
    """
    # Those on test rows are of an earlier evaluation.
    entry.seeds = {k: v for k, v in entry.seeds.items() if v.get("rows") == "validation"}
    entry.evaluations = asdict(evaluated.begin())
    entry.update(figures(entry, items))
    evaluated.end(entry.outcome)
