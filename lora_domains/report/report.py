"""Cards and reports: reading them, rebuilding figures from items, many adapters in one report.

``card.json`` and ``report.json`` have one shape (DESIGN.md, "On disk"; ``figures`` says what more
an entry holds); a card has one adapter. None of this needs a model: what is measured stands in
``items.jsonl``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterCorrupt, AdapterMismatch, UsageError
from lora_domains.report.html import page
from lora_domains.report.junit import junit
from lora_domains.report.markdown import COMMENT, summary
from lora_domains.report.regressions import answers
from lora_domains.report.text import gained
from lora_domains.tasks import positive_index, task_from_record, upgraded_record
from lora_domains.verdict.scores import Rows, chosen
from lora_domains.verdict.summary import summarise, value

SCHEMA = 1
CARD, ITEMS = "card.json", "items.jsonl"
REPORT = "report.json"
MISTAKES = 20
"""Rows that an adapter got wrong, listed for each in a report, at most."""


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an adapter folder; raises AdapterCorrupt when it cannot be read as one."""
    where = f"{folder.name}/{CARD}"
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        found = "other keys" if isinstance(card, dict) else type(card).__name__
    except (OSError, ValueError, RecursionError) as error:
        card, found = None, "no file" if isinstance(error, OSError) else "no JSON"
    whole = (
        isinstance(card, dict)
        and isinstance(card.get("base"), dict)
        and {"id", "identity", "dtype", "quantization"} <= card["base"].keys()
        and isinstance(card.get("adapters"), list)
        and len(card["adapters"]) == 1
        and isinstance(card["adapters"][0], dict)
        and {"domain", "sha256"} <= card["adapters"][0].keys()
    )
    if not whole:
        raise AdapterCorrupt(
            where=where,
            expected="a card: one JSON object with 'base' and one entry in 'adapters'",
            found=found,
            hint="Copy the adapter folder again, or remove card.json to load it unverified.",
        )
    if card.get("schema") != SCHEMA:
        raise AdapterCorrupt(
            where=where,
            expected=f"schema {SCHEMA}",
            found=f"schema {card.get('schema')!r}",
            hint="Update lora-domains to read it.",
        )
    for settings in (card["adapters"][0].get(key) for key in ("settings", "trained_with")):
        if isinstance(settings, dict) and isinstance(settings.get("task"), dict):
            settings["task"] = upgraded_record(settings["task"])
    return dict(card)


def read_items(folder: Path) -> list[dict[str, Any]]:
    """The per-item scores of an adapter folder; raises AdapterCorrupt when they cannot be read."""
    try:
        text = (folder / ITEMS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise AdapterCorrupt(
            where=f"{folder.name}/{ITEMS}",
            expected="per-item scores, one JSON object on each line",
            found="no file" if isinstance(error, OSError) else "no JSON",
            hint="Evaluate the adapter again, or copy its folder again.",
        ) from None


def figures(entry: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An adapter's figures, gates and verdict, from its items and the rules its card declares."""
    from lora_domains.domain import Gates

    judged = entry["judged"]
    return summarise(
        items,
        metrics=task_from_record(entry["settings"]["task"]).metrics,
        metric=judged["metric"],
        labels=judged["labels"],
        positive=positive_index(judged["labels"], judged["positive"]),
        gates=Gates(**entry["settings"]["gates"]),
        leaks=entry["leaks"],
        base_changed=judged["base_changed"],
        largest_move=judged["largest_move"],
        knowledge=judged.get("knowledge", "questions"),
        looks=entry.get("looks"),
        threshold=judged.get("threshold"),
    )


def rebuild(folder: Path) -> dict[str, Any]:
    """The card again, its figures computed anew from ``items.jsonl``, without a model or torch."""
    return _rebuilt(folder)[0]


def _rebuilt(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A card with its figures computed anew, and its items.

    Raises AdapterCorrupt when card or items are not what an evaluation writes.
    """
    card = read_card(folder)
    entry = card["adapters"][0]
    if "judged" not in entry:
        return card, []
    items = read_items(folder)
    try:
        entry.update(figures(entry, items))
        json.dumps(card, allow_nan=False)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise AdapterCorrupt(
            where=folder.name,
            expected=f"a {CARD} and {ITEMS} as an evaluation writes them",
            found=f"{type(error).__name__}: {error}",
            hint="Evaluate the adapter again, or copy its folder again.",
        ) from error
    return card, items


# ── Many adapters, one base ─────────────────────────────────────────────────────────────────────


def combine(folders: Sequence[Path], *, show_text: bool = False) -> dict[str, Any]:
    """The report of adapter folders on one base, every figure computed anew from their items.

    In a report an adapter goes by the name of its folder (``path``). ``show_text`` takes the text
    of rows that were answered wrongly into it, where the items hold any. Raises AdapterMismatch
    when the adapters were measured on different bases or at different precisions, UsageError when
    there is none or two folders share a name, AdapterCorrupt when one cannot be read.
    """
    if not folders:
        raise UsageError(
            expected="at least one adapter folder",
            found="none",
            hint="lora-domains report adapters/* --out reports/",
        )
    measured: dict[str, Measured] = {}
    first: dict[str, Any] = {}
    made_with: list[dict[str, Any]] = []
    for folder in folders:
        name = folder.resolve().name
        if name in measured:
            raise UsageError(
                where=str(folder),
                expected="adapter folders of different names",
                found=f"{name!r} twice",
                hint="Report them apart, or rename one; --baseline shows what changed.",
            )
        card, items = _rebuilt(folder)
        first = first or card
        _same_base(first, card, name)
        made_with.append(card.get("environment", {}))
        measured[name] = summed_up(name, card["adapters"][0], items, show_text)
    shared = {
        key: value if all(other.get(key) == value for other in made_with) else None
        for key, value in made_with[0].items()
    }
    # Where runs differ (a commit, a device) each adapter says its own.
    for (entry, _), environment in zip(measured.values(), made_with, strict=True):
        own = {key: value for key, value in environment.items() if shared.get(key) != value}
        entry |= {"environment": own} if own else {}
    return assemble(first["base"], shared, measured)


Measured = tuple[dict[str, Any], dict[str, float | None]]
"""An adapter's entry in a report, and what other adapters score on its domain's test rows."""


def summed_up(
    name: str, entry: Mapping[str, Any], items: Sequence[Mapping[str, Any]], show_text: bool
) -> Measured:
    """What a report keeps of an adapter: figures only, since many items would fill the memory."""
    # One without an evaluation has no gate, and no gate is no pass.
    kept = {"gates": [], "verdict": "inconclusive", **entry, "path": name}
    test = chosen(items, "set", "test")
    if not test:
        return kept, {}
    kept["mistakes"] = mistakes(test, kept["judged"]["labels"], show_text)
    kept["answers"] = {"domain": answers(test, kept["judged"]["metric"])}
    if general := chosen(items, "set", "general"):
        kept["answers"]["general"] = answers(general, "accuracy")
    return kept, others(kept["judged"], test)


def assemble(
    base: Mapping[str, Any], environment: Mapping[str, Any], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """The report of adapters that were measured on one base."""
    entries = {name: entry for name, (entry, _) in measured.items()}
    crossed = {name: found for name, (entry, found) in measured.items() if "mistakes" in entry}
    return {
        "schema": SCHEMA,
        "base": dict(base),
        "environment": dict(environment),
        "adapters": list(entries.values()),
        "matrix": matrix(entries, crossed),
    }


def _same_base(first: Mapping[str, Any], card: Mapping[str, Any], name: str) -> None:
    """Gains over different bases, or over one base at two precisions, do not compare."""
    for key in ("identity", "quantization", "dtype"):
        one, other = first["base"][key], card["base"][key]
        if one != other:
            found = f"{card['base']['id']} with {key} {str(other)[:12]}"
            raise AdapterMismatch(
                where=name,
                expected=f"the base of the adapters before it: {first['base']['id']} "
                f"with {key} {str(one)[:12]}",
                found=found,
                hint="Make one report for each base and precision.",
            )


def others(judged: Mapping[str, Any], test: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What other adapters score on a domain's test rows, by its metric: {ADAPTER: figure}.

    Beside its own scores an item may hold theirs on it, under ``others``: {ADAPTER: score}.
    """
    index = positive_index(judged["labels"], judged["positive"])
    names = test[0].get("others", {})
    rows = Rows([{**item, "scores": item["others"]} for item in test] if names else [])
    return {name: value(judged["metric"], rows, name, index) for name in names}


def matrix(
    entries: Mapping[str, Mapping[str, Any]], crossed: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """What each adapter scores on each domain's test rows: adapters by domains.

    ``values[row][column]`` is None where it was not measured; ``metrics`` and ``base`` hold each
    column's metric and the base's figure. ``crossed`` is ``others`` of each evaluated domain.
    """
    scored = {name: gained(entries[name]) for name in crossed}
    columns = {name: found for name, found in scored.items() if found}
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


def mistakes(
    test: Sequence[Mapping[str, Any]], labels: Sequence[str], show_text: bool
) -> list[dict[str, Any]]:
    """The test rows that the adapter got wrong, the surest first; their text if ``show_text``."""

    def named(number: int) -> str:
        # Without labels the choices are the row's own text.
        return labels[number] if 0 <= number < len(labels) else f"choice {number + 1}"

    wrong = []
    for item in test:
        said = item["scores"]["adapter"]
        if "prediction" in said and said["prediction"] != item["target"]:
            row = {
                "id": item["id"],
                "true": named(item["target"]),
                "adapter": named(said["prediction"]),
                "base": named(item["scores"]["base"]["prediction"]),
                "confidence": said["confidence"],
            }
            wrong.append(row | ({"text": item["text"]} if show_text and "text" in item else {}))
    return sorted(wrong, key=lambda row: -row["confidence"])[:MISTAKES]


# ── On disk ─────────────────────────────────────────────────────────────────────────────────────


def read_report(path: Path) -> dict[str, Any]:
    """An older report, or a card; raises UsageError when it cannot be read as one."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = "other keys"
    except (OSError, ValueError, RecursionError) as error:
        report, found = None, "no file" if isinstance(error, OSError) else "no JSON"
    whole = (
        isinstance(report, dict)
        and report.get("schema") == SCHEMA
        and isinstance(report.get("base"), dict)
        and {"id", "identity"} <= report["base"].keys()
        and isinstance(report.get("adapters"), list)
        and all(isinstance(e, dict) and {"path", "domain"} <= e.keys() for e in report["adapters"])
    )
    if not whole:
        raise UsageError(
            where=str(path),
            expected=f"a report of schema {SCHEMA}: {REPORT} of an earlier run",
            found=found,
            hint="lora-domains report adapters/* --out reports/ writes one.",
        )
    return dict(report)


def save_report(report: Mapping[str, Any], out: Path, junit_file: Path | None = None) -> None:
    """Write ``report.json`` and its views, each file whole or not at all.

    Views: ``report.html``, ``report.md`` for a job summary, ``comment.md`` for a pull request, and
    ``junit.xml`` (at ``junit_file`` where given). Raises UsageError when they cannot be written.
    """
    views = {
        out / REPORT: json.dumps(report, indent=1, allow_nan=False) + "\n",
        out / "report.html": page(report),
        out / "report.md": summary(report),
        out / "comment.md": summary(report, COMMENT),
        junit_file or out / "junit.xml": junit(report),
    }
    _write(views)


def _write(texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise UsageError(
                where=str(path),
                expected="a place that can be written",
                found=error.strerror or str(error),
                hint="Choose another --out, or free some space.",
            ) from error


def save_items(folder: Path, card: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
    """Keep a card and its items as ``rebuild`` reads them; raises UsageError when it cannot."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    _write({folder / CARD: json.dumps(card, indent=1) + "\n", folder / ITEMS: lines})
