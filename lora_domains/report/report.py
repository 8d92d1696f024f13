"""Reports: figures computed again from items, many adapters in one report, its files.

None of this needs a model: what was measured is in ``items.jsonl``.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_domains.atomic import adapter_name, write_files
from lora_domains.errors import AdapterCorrupt, AdapterMismatch, UsageError
from lora_domains.report import terminal
from lora_domains.report.card import (
    CARD,
    ITEMS,
    AdapterEntry,
    BaseRecord,
    Card,
    Environment,
    Report,
    read_items,
)
from lora_domains.report.html import notebook_report, page
from lora_domains.report.junit import junit
from lora_domains.report.markdown import comment, summary
from lora_domains.report.text import gained, outcome
from lora_domains.verdict import CONTENDERS
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.ledger import Standing
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import summarise

REPORT = "report.json"
MISTAKES = 20
"""The number of wrongly answered rows listed for each adapter, at most."""
Items = Sequence[Mapping[str, Any]]
Row = dict[str, Any]
"""A row in the list of mistakes, as the schema of a card describes it."""


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Evaluation:
    """An adapter's card after its evaluation; printing it shows the verdict and the tables."""

    card: Card

    @property
    def entry(self) -> AdapterEntry:
        return self.card.adapter

    @property
    def verdict(self) -> str:
        return self.entry.outcome

    def show(self, console: Console, since: Mapping[str, Any] | None = None) -> None:
        """Print it; ``since`` holds the changes from an older adapter (``regressions``)."""
        terminal.evaluation(console, self.entry, since)

    def __str__(self) -> str:
        return _printed(self.show)

    def __repr__(self) -> str:
        return repr(self.card).replace("Card", "Evaluation", 1)

    def _repr_html_(self) -> str:
        return self.card._repr_html_()


def _printed(show: Callable[[Console], None]) -> str:
    """What ``show`` prints in a terminal of this width, or of 100 where there is none."""
    text = io.StringIO()
    show(Console(file=text, emoji=False, width=shutil.get_terminal_size((100, 24)).columns))
    return text.getvalue()


def figures(entry: AdapterEntry, items: Items) -> dict[str, Any]:
    """An adapter's figures, gates and verdict, from its items and the rules its card declares."""
    evidence = evidence_of(entry, items)
    return summarise(evidence, entry.settings["gates"], entry.judged.get("threshold"))


def evidence_of(entry: AdapterEntry, items: Items) -> Evidence:
    """What the gates of an evaluated adapter are judged on."""
    judged, move = entry.judged, entry.judged["largest_move"]
    return Evidence(
        ScoreTable(items),
        metric_named(judged["metric"]),
        judged["labels"],
        entry.positive_index,
        knowledge=judged.get("knowledge", "questions"),
        leaks=entry.leaks or None,
        near_leaks={row for _, row, how in entry.leaks.get("pairs", ()) if how == "near"},
        trained_elsewhere=entry.trained_elsewhere,
        embedded_base=judged.get("embedded_base", False),
        prevalence=judged.get("prevalence"),
        base_changed=judged["base_changed"],
        largest_move=float("nan") if move is None else move,
        evaluations=Standing(**entry.evaluations) if entry.evaluations else None,
    )


def rebuild(folder: Path) -> Card:
    """The card of an adapter folder, its figures computed again from ``items.jsonl``."""
    return rebuilt(folder)[0]


def rebuilt(folder: Path) -> tuple[Card, list[dict[str, Any]]]:
    """A card with its figures computed again, and its items (none before an evaluation).

    Raises AdapterCorrupt when card or items are not what an evaluation writes.
    """
    card = Card.read(folder)
    if not card.adapter.judged:
        return card, []
    items = read_items(folder)
    try:
        card.adapter.update(figures(card.adapter, items))
        card.dumps()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AdapterCorrupt(
            where=folder.name,
            expected=f"a {CARD} and {ITEMS} as an evaluation writes them",
            found=f"{type(error).__name__}: {error}",
            hint="Evaluate the adapter again, or copy its folder again.",
        ) from error
    return card, items


# ── Many adapters, one base ─────────────────────────────────────────────────────────────────────


def combine(folders: Sequence[Path], *, show_text: bool = False) -> Report:
    """The report of adapter folders on one base, every figure computed again from their items.

    An adapter has the name of its folder (``path``). With ``show_text``, the report holds the text
    of wrongly answered rows, where the items hold it. Raises AdapterMismatch when the adapters were
    measured on different bases or at different precisions, UsageError when there is no folder or
    two have one name, AdapterCorrupt when one cannot be read.
    """
    if not folders:
        raise UsageError(
            expected="at least one adapter folder",
            found="none",
            hint="lora-domains report adapters/* --out reports/",
        )
    measured: dict[str, Measured] = {}
    cards: list[Card] = []
    for folder in folders:
        name = adapter_name(folder)
        if name in measured:
            raise UsageError(
                where=str(folder),
                expected="adapter folders of different names",
                found=f"{name!r} twice",
                hint="Make a report of each, or rename one; --against shows what changed.",
            )
        card, items = rebuilt(folder)
        cards.append(card)
        _check_base(cards[0].base, card.base, name)
        measured[name] = summed_up(name, card.adapter, items, show_text)
    shared = _shared_environment([card.environment for card in cards])
    for (entry, _), card in zip(measured.values(), cards, strict=True):
        entry.environment = {k: v for k, v in card.environment.items() if shared.get(k) != v}
    return assemble(cards[0].base, shared, measured)


def _shared_environment(environments: Sequence[Environment]) -> Environment:
    """What is the same for all adapters; None where they differ (a commit, a device)."""
    return {
        key: value if all(other.get(key) == value for other in environments) else None
        for key, value in environments[0].items()
    }


Measured = tuple[AdapterEntry, dict[str, float | None]]
"""An adapter's entry in a report, and the figures of other adapters on its test rows."""


def summed_up(name: str, entry: AdapterEntry, items: Items, show_text: bool) -> Measured:
    """The part of an adapter in a report: figures only, since many items would fill the memory."""
    reported = replace(entry, path=name, verdict=entry.outcome, mistakes=None)
    test = ScoreTable(items).where("set", "test")
    if not test:
        return reported, {}
    reported.mistakes = mistakes(test, entry.judged["labels"], show_text)
    return reported, others(entry, test)


def assemble(
    base: BaseRecord, environment: Mapping[str, Any], measured: Mapping[str, Measured]
) -> Report:
    """The report of adapters that were measured on one base."""
    entries = {name: entry for name, (entry, _) in measured.items()}
    evaluated = {n: part for n, part in measured.items() if part[0].mistakes is not None}
    crossed = {name: scores for name, (_, scores) in evaluated.items()}
    return Report(
        base=base,
        environment=dict(environment),
        adapters=list(entries.values()),
        matrix=matrix(entries, crossed),
    )


def _check_base(first: BaseRecord, base: BaseRecord, name: str) -> None:
    """Gains over different bases, or over one base at two precisions, are not comparable."""
    for key in ("identity", "quantization", "dtype"):
        one, other = getattr(first, key), getattr(base, key)
        if one != other:
            raise AdapterMismatch(
                where=name,
                expected=f"the base of the adapters before it: {first.id} "
                f"with {key} {str(one)[:12]}",
                found=f"{base.id} with {key} {str(other)[:12]}",
                hint="Make one report for each base and precision.",
            )


def others(entry: AdapterEntry, test: ScoreTable) -> dict[str, float | None]:
    """The figures of other adapters on a domain's test rows, by its metric: {ADAPTER: figure}.

    An item may hold their scores under ``others``: {ADAPTER: score}.
    """
    names = test[0].get("others", {})
    rows = ScoreTable([{**item, "scores": item["others"]} for item in test] if names else [])
    metric = metric_named(entry.judged["metric"])
    return {name: metric.value(rows, name, entry.positive_index) for name in names}


def matrix(
    entries: Mapping[str, AdapterEntry], crossed: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """Each adapter's figure on each domain's test rows: adapters by domains.

    ``values[row][column]`` is None where it was not measured; ``metrics`` and ``base`` hold each
    column's metric and the base's figure. ``crossed`` is ``others`` of each evaluated domain.
    """
    columns = {name: decisive for name in crossed if (decisive := gained(entries[name]))}
    return {
        "rows": list(entries),
        "columns": list(columns),
        "values": [
            [
                fields["adapter"] if name == domain else crossed[domain].get(name)
                for domain, (_, fields) in columns.items()
            ]
            for name in entries
        ],
        "metrics": [metric for metric, _ in columns.values()],
        "base": [fields["base"] for _, fields in columns.values()],
    }


def _in_words(labels: Sequence[str]) -> str:
    """Several labels as a sentence names them."""
    return "; ".join(labels) or "none"


def mistakes(
    test: ScoreTable, labels: Sequence[str], show_text: bool, most: int | None = MISTAKES,
    joined: Callable[[list[str]], str] = _in_words,
) -> list[dict[str, Any]]:  # fmt: skip
    """The wrongly answered test rows, the worst first, at most ``most`` if that is not None; with
    their text if ``show_text``; several labels are ``joined``.

    Wrong labels and choices are worse the more confident they are, numbers the farther they are
    from the true one, and generated answers the lower their token F1. What is generated and the
    reference are text of a row.
    """

    def label_of(number: int) -> str:
        # Without labels, the choices are text of the row.
        return labels[number] if 0 <= number < len(labels) else f"choice {number + 1}"

    def labels_of(has: Sequence[float]) -> str:
        return joined([label for label, one in zip(labels, has, strict=True) if one])

    def compared(item: Mapping[str, Any], true: Any, key: str, shown: Callable[[Any], str]) -> Row:
        base = item["scores"]["base"].get(key)
        return {
            "true": shown(true),
            "adapter": shown(item["scores"]["adapter"][key]),
            "base": "–" if base is None else shown(base),
        }

    wrong: list[Row] = []
    for item in test:
        score, base = item["scores"]["adapter"], item["scores"]["base"]
        if "predicted" in score and score["predicted"] != item["truth"]:
            row = compared(item, item["truth"], "predicted", labels_of)
            row["confidence"] = score.get("confidence", 0.0)
        elif "prediction" in score and score["prediction"] != item["target"]:
            row = compared(item, item["target"], "prediction", label_of)
            row["confidence"] = score["confidence"]
        elif score.get("value") is not None:
            row = compared(item, item["truth"][0], "value", "{:.6g}".format)
            row["error"] = abs(score["value"] - item["truth"][0])
        elif score.get("exact", 1) < 1:
            row = {"f1": score["f1"], "base_f1": base.get("f1")}
            if show_text and "answers" in item:
                texts = item["answers"]
                row["true"] = texts["reference"]
                row |= {who: texts[who] for who in CONTENDERS if who in texts}
        else:
            continue
        text = {"text": item["text"]} if show_text and "text" in item else {}
        wrong.append({"id": item["id"]} | row | text)
    return sorted(wrong, key=_worst_first)[:most]


def _worst_first(row: Row) -> float:
    signs = {"f1": 1.0, "error": -1.0, "confidence": -1.0}
    return next(sign * float(row[key]) for key, sign in signs.items() if key in row)


# ── On disk ─────────────────────────────────────────────────────────────────────────────────────

VIEWS: dict[str, Callable[[Report], str]] = {
    "report.html": page,
    "report.md": summary,  # for a job summary
    "comment.md": comment,  # for a pull request
    "junit.xml": junit,
}
"""The views of a report by file name. A new one is a function here: report in, text out."""


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measured: a report of several adapters, and the items it was made from."""

    report: Report
    items: dict[str, list[dict[str, Any]]]

    @property
    def verdict(self) -> str:
        """The worst verdict among the adapters."""
        return outcome(self.report)

    def __str__(self) -> str:
        return _printed(lambda console: terminal.report(console, self.report))

    def __repr__(self) -> str:
        return repr(self.report).replace("Report", "Benchmark", 1)

    def _repr_html_(self) -> str:
        return notebook_report(self.report)

    def save(self, out: str | Path, junit: str | Path | None = None) -> Path:
        """Write the report and its views into the folder ``out``; returns it.

        Beside them ``measured/NAME`` holds each adapter's card and items of this run, from which
        ``lora-domains report`` makes the same report again. Raises UsageError when they cannot be
        written.
        """
        folder = Path(out)
        for entry in self.report.adapters:
            place = folder / "measured" / entry.path
            environment = self.report.environment
            card = Card(base=self.report.base, environment=environment, adapter=entry)
            lines = "".join(json.dumps(item) + "\n" for item in self.items[entry.path])
            write_files({place / CARD: card.dumps(), place / ITEMS: lines})
        save_report(self.report, folder, Path(junit) if junit else None)
        return folder


def save_report(report: Report, out: Path, junit_file: Path | None = None) -> None:
    """Write ``report.json`` and its ``VIEWS`` into ``out``, each file whole or not at all.

    ``junit_file`` is the place of ``junit.xml``, where it is another. Raises UsageError when a file
    cannot be written.
    """
    texts = {out / REPORT: json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"}
    texts |= {out / name: view(report) for name, view in VIEWS.items()}
    if junit_file:
        texts[junit_file] = texts.pop(out / "junit.xml")
    write_files(texts)
