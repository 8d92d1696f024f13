"""``card.json`` and ``report.json``, typed: a ``Card`` reads, writes and validates itself.

The shape of the file is in ``assets/card.schema.json``; this file checks a card against it when it
is read and before it is written. What a run measured for each item is in ``items.jsonl``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterCorrupt
from lora_domains.schema import Checker, checker
from lora_domains.verdict.rules import thresholds_of_today

if TYPE_CHECKING:
    from lora_domains.tasks import Task

Environment = dict[str, str | int | None]
"""Versions, machine and seed of a run; None where a value is unknown."""
SCHEMA, CARD, ITEMS = 1, "card.json", "items.jsonl"
OLD_GATES = {"alive": "effect", "looks": "evaluations"}
"""Names of gates in older cards, and their names today."""
OLD_SETTINGS, NEW_SETTING = {"loss_unit", "wanted_precision", "wanted_recall"}, "chat"
"""Settings of tasks that only older cards have, and one that they lack (``upgraded_record``)."""


@dataclass(frozen=True)
class BaseRecord:
    """The base that an adapter was trained on and evaluated against."""

    id: str
    revision: str | None
    identity: str
    dtype: str
    quantization: str | None
    licence: str | None = None

    @property
    def precision(self) -> str:
        return self.quantization or self.dtype


@dataclass(frozen=True)
class ParentRecord:
    """The adapter that training continued from."""

    name: str
    sha256: str


@dataclass(kw_only=True)
class AdapterEntry:
    """One adapter in a card or a report: how it was trained, and what an evaluation found.

    Attributes have the names of the keys in ``card.json``. A mapping is empty, and everything else
    None, where nothing is known; ``judged`` is empty until the adapter is evaluated.
    """

    domain: str
    path: str
    """The name of the adapter's folder."""
    sha256: str | None
    """Digest of the two files of PEFT; None until they are written."""
    trained_elsewhere: bool = False
    """Whether others trained it, so that neither its base nor its rows can be verified."""
    recipe_digest: str | None = None
    parent: ParentRecord | None = None
    pooling: str | None = None
    """How the head's encoder is pooled, where transformers has no model with such a head."""
    scale: float = 1.0
    """What its trained effect is multiplied by (``analysis.scale_curve.apply_scale``)."""
    chat: dict[str, str] = field(default_factory=dict)
    """The chat template that renders the prompts, where one does: ``template`` is "own" for that of
    the base and "plain" where it has none; ``sha256`` is the digest of its text."""
    settings: dict[str, Any] = field(default_factory=dict)
    """``task``, ``data``, ``lora``, ``training``, ``gates``, ``show_text`` and ``metric`` of the
    domain."""
    trained_with: dict[str, Any] = field(default_factory=dict)
    """Task, gates and metric at training, where an evaluation used others."""
    data: dict[str, str] = field(default_factory=dict)
    """Digests of the rows by split, and of the general text."""
    trained_rows: dict[str, str] = field(default_factory=dict)
    """The rows read in training, and in that of the adapters it continues from, as keyed digests
    (``data.leaks.trained_rows``)."""
    training: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    """Row counts: read, refused, duplicates, truncated, masked; and the supervised tokens."""
    leaks: dict[str, Any] = field(default_factory=dict)

    # Added by an evaluation.
    judged: dict[str, Any] = field(default_factory=dict)
    """What is needed, beside the items, to compute the figures again."""
    evaluations: dict[str, Any] | None = None
    """This evaluation among all those of the same test set (``verdict.ledger.Standing``)."""
    domain_scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    general: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    verdict: str | None = None
    without_near_leaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``domain_scores`` on the test rows that are no near leak, where some are."""
    over_parent: dict[str, dict[str, Any]] = field(default_factory=dict)
    confusion: dict[str, Any] = field(default_factory=dict)
    per_class: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    memorisation: dict[str, Any] = field(default_factory=dict)

    # Added by comparisons and by a report.
    seeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    scale_curve: dict[str, Any] = field(default_factory=dict)
    mistakes: list[dict[str, Any]] | None = None
    environment: Environment = field(default_factory=dict)
    """Where it differs from that of other adapters in a report."""

    @property
    def task(self) -> dict[str, Any]:
        """The settings of the task, ``kind`` among them."""
        task: dict[str, Any] = self.settings.get("task", {})
        return task

    @property
    def declared_task(self) -> "Task | None":
        """The task of the settings; None without settings.

        Raises DomainError for a kind that is not registered.
        """
        from lora_domains.tasks import task_from_record

        return task_from_record(self.task) if self.task else None

    @property
    def metric(self) -> str | None:
        """The metric that decides: of the evaluation, or before one that of the settings."""
        named = self.judged.get("metric") or self.settings.get("metric")
        return str(named) if named else self.declared_task.metric if self.declared_task else None

    @property
    def positive_index(self) -> int | None:
        """The number of the positive class, in the settings before an evaluation; None without."""
        if not self.judged:
            return self.declared_task.positive_index if self.declared_task else None
        from lora_domains.tasks import positive_index

        return positive_index(self.judged["labels"], self.judged["positive"])

    def __repr__(self) -> str:
        return f"<AdapterEntry {self.path}: {self.verdict or 'not evaluated'}>"

    def update(self, figures: Mapping[str, Any]) -> None:
        """Set the attributes that ``figures`` names (as ``verdict.summary.summarise`` does)."""
        for name, value in figures.items():
            if name not in self.__dataclass_fields__:
                raise AttributeError(f"a card has no figure called {name!r}")
            setattr(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """The entry as ``card.json`` holds it: what is unknown is left out."""
        written: dict[str, Any] = {}
        for name in (part.name for part in fields(self)):
            value = getattr(self, name)
            evaluated = name in FIGURES and self.verdict is not None
            known = value not in (None, {}, [], False) and (name, value) != ("scale", 1)
            if name in ALWAYS or evaluated or known:
                written[name] = value
        if self.mistakes is not None:
            written["mistakes"] = self.mistakes
        if self.parent is not None:
            written["parent"] = dict(vars(self.parent))
        return written

    @property
    def outcome(self) -> str:
        """The verdict; inconclusive without an evaluation."""
        return self.verdict or "inconclusive"


ALWAYS = {"domain", "path", "sha256", "recipe_digest", "parent"}
FIGURES = {"domain_scores", "general", "slices", "gates"}
"""Written once there is a verdict, even when empty."""
MEASURED = FIGURES | {"calibration", "confusion", "curve", "memorisation", "mistakes",
                      "over_parent", "per_class", "scale_curve", "seeds",
                      "without_near_leaks"}  # fmt: skip
"""What an evaluation or a comparison found; loading the adapter does not depend on it."""


@dataclass(kw_only=True)
class Card:
    """One adapter on one base, as ``card.json`` in its folder holds it."""

    base: BaseRecord
    environment: Environment = field(default_factory=dict)
    adapter: AdapterEntry

    def __repr__(self) -> str:
        from lora_domains.report.text import in_brief

        return f"<Card {self.adapter.path} on {self.base.id}: {in_brief(self.adapter)}>"

    def _repr_html_(self) -> str:
        from lora_domains.report.html import notebook_card

        return notebook_card(self.adapter, self.base.id)

    @classmethod
    def read(cls, folder: Path, *, measured: bool = True) -> Self:
        """The card of an adapter folder; raises AdapterCorrupt when it is none.

        Without ``measured`` its figures are checked only when they are shown or written.
        """
        where = f"{folder.name}/{CARD}"
        try:
            stored = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found = "no file" if isinstance(error, OSError) else "no JSON"
            raise _corrupt(where, "a card: one JSON object", found) from None
        return cls.from_json(stored, where, measured=measured)

    @classmethod
    def from_json(cls, stored: Any, where: str, *, measured: bool = True) -> Self:
        """The card in parsed JSON, upgraded; see ``read``. ``where`` names the file in errors."""
        if isinstance(stored, Mapping) and stored.get("schema") != SCHEMA:
            raise AdapterCorrupt(
                where=where,
                expected=f"schema {SCHEMA}",
                found=f"schema {stored.get('schema')!r}",
                hint="Update lora-domains to read it.",
            )
        stored = _upgraded(stored)
        check(stored if measured else _declared(stored), where)
        (entry,) = stored["adapters"]
        entry = {"path": entry["domain"], "parent": None, **entry}
        if entry["parent"] is not None:
            entry["parent"] = ParentRecord(**entry["parent"])
        return cls(
            base=BaseRecord(**{"revision": None, **stored["base"]}),
            environment=stored.get("environment", {}),
            adapter=AdapterEntry(**entry),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that ``card.json`` holds."""
        return {
            "schema": SCHEMA,
            "base": dict(vars(self.base)),
            "environment": self.environment,
            "adapters": [self.adapter.to_json()],
        }

    def dumps(self) -> str:
        """The text of ``card.json``; raises AdapterCorrupt for what a reader would refuse."""
        # Through JSON once, so that tuples are arrays and keys are strings, as a reader has them.
        text = json.dumps(self.to_json(), indent=1)
        check(json.loads(text), f"{self.adapter.path}/{CARD}")
        return text + "\n"

    def write(self, folder: Path) -> None:
        """Replace the card of an adapter folder."""
        write_text(folder / CARD, self.dumps())


@dataclass(kw_only=True)
class Report:
    """Adapters that were measured on one base, as ``report.json`` holds them."""

    base: BaseRecord
    environment: Environment
    """None where adapters differ; each says its own then."""
    adapters: list[AdapterEntry]
    matrix: dict[str, Any]
    """Each adapter's figure on the test rows of each domain (``report.matrix``)."""
    since: dict[str, Any] | None = None
    """Changes since older adapters (``regressions``)."""

    def __repr__(self) -> str:
        names = ", ".join(entry.path for entry in self.adapters)
        return f"<Report of {names} on {self.base.id}>"

    def to_json(self) -> dict[str, Any]:
        """The object that ``report.json`` holds."""
        written = {
            "schema": SCHEMA,
            "base": dict(vars(self.base)),
            "environment": self.environment,
            "adapters": [entry.to_json() for entry in self.adapters],
            "matrix": self.matrix,
        }
        return written | ({} if self.since is None else {"since": self.since})


def read_items(folder: Path) -> list[dict[str, Any]]:
    """The scores of each item in an adapter folder; raises AdapterCorrupt when there are none."""
    try:
        text = (folder / ITEMS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise AdapterCorrupt(
            where=f"{folder.name}/{ITEMS}",
            expected="scores of each item, one JSON object on each line",
            found="no file" if isinstance(error, OSError) else "no JSON",
            hint="Evaluate the adapter again, or copy its folder again.",
        ) from None


def _upgraded(stored: Any) -> Any:
    """A card of this schema as an earlier version wrote it, with the keys and names of today."""
    entries = stored.get("adapters") if isinstance(stored, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        return stored
    base, renewed = stored.get("base"), []
    embedded = isinstance(base, Mapping) and base.get("id") == "embedded"
    for entry in entries:
        # Packed answers were kept for comparisons, which read the items now.
        entry = {key: value for key, value in entry.items() if key != "answers"}
        if isinstance(entry.get("gates"), list):
            entry["gates"] = [_renamed(gate) for gate in entry["gates"]]
        for name in ("settings", "trained_with"):
            settings = entry.get(name)
            if isinstance(settings, Mapping) and isinstance(settings.get("task"), Mapping):
                entry[name] = settings = {**settings, "task": _task_of_today(settings["task"])}
            if isinstance(settings, Mapping) and isinstance(settings.get("gates"), Mapping):
                entry[name] = {**settings, "gates": thresholds_of_today(settings["gates"])}
        looks = entry.get("looks")
        if isinstance(looks, Mapping) and isinstance(looks.get("adapters"), int):
            entry["evaluations"] = _standing(entry.pop("looks"))
        if isinstance(entry.get("curve"), Mapping):
            entry["curve"] = _with_targets(entry["curve"])
        judged = entry.get("judged")
        if isinstance(judged, Mapping) and judged:
            judged = entry["judged"] = {"embedded_base": embedded, **judged}
        if isinstance(judged, Mapping) and isinstance(judged.get("threshold"), Mapping):
            entry["judged"] = {**judged, "threshold": _with_targets(judged["threshold"])}
        renewed.append(entry)
    return {**stored, "adapters": renewed}


def _task_of_today(record: Mapping[str, Any]) -> Mapping[str, Any]:
    if NEW_SETTING in record and not OLD_SETTINGS & record.keys():
        return record  # no kind of task is imported
    from lora_domains.tasks import upgraded_record

    return upgraded_record(record)


def _renamed(gate: Any) -> Any:
    name = gate.get("name") if isinstance(gate, Mapping) else None
    return {**gate, "name": OLD_GATES.get(name, name)} if isinstance(name, str) else gate


def _standing(looks: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version kept of earlier evaluations, by the budget of today."""
    from lora_domains.verdict.gates import Gates
    from lora_domains.verdict.ledger import Standing, level

    number, budget = int(looks["adapters"]) + 1, Gates().evaluations
    standing = Standing(str(looks.get("test_set"))[:16], number, budget, level(budget))
    return {**vars(standing), "broken": looks.get("broken")}


def _with_targets(threshold: Mapping[str, Any]) -> dict[str, Any]:
    return {"targets" if key == "wanted" else key: value for key, value in threshold.items()}


def _corrupt(where: str, expected: str, found: str) -> AdapterCorrupt:
    hint = "Copy the adapter folder again, or remove card.json to load it unverified."
    return AdapterCorrupt(where=where, expected=expected, found=found, hint=hint)


# ── Validation against the schema ───────────────────────────────────────────────────────────────


def _declared(stored: Any) -> Any:
    """The stored card without what was measured; as it is where it is no card."""
    match stored:
        case {"adapters": [dict(entry)]}:
            return stored | {"adapters": [{k: v for k, v in entry.items() if k not in MEASURED}]}
    return stored


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a card."""
    path = Path(__file__).parent / "assets" / "card.schema.json"
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


@cache
def _checker() -> Checker:
    return checker(schema())


def check(stored: Any, where: str) -> None:
    """Raise AdapterCorrupt, naming the key, when parsed JSON is no card by its schema."""
    if fault := _checker()(stored):
        raise _corrupt(f"{where}, {fault.key}" if fault.key else where, fault.expected, fault.found)
