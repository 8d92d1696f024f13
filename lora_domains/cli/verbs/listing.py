"""Adapters in a table: those of a folder, and the versions of one. It imports no torch."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.segment import Segments
from rich.table import Table

from lora_domains.adapters.folder import CONFIG, is_adapter
from lora_domains.adapters.versions import versions as versions_kept
from lora_domains.atomic import folders_with
from lora_domains.console.display import given_columns
from lora_domains.errors import AdapterCorrupt
from lora_domains.report.card import CARD, AdapterEntry, Card
from lora_domains.report.terminal import COLOURS
from lora_domains.report.text import gained, kept, metric_name

Record = Mapping[str, Any]
"""What is listed of an adapter (``summary_of``)."""
UNEVALUATED = "not evaluated"
COLUMNS = ("adapter", "verdict", "score", "trained", "versions", "base")
"""The columns of the table of adapters, from left to right."""
LEAST_IMPORTANT = ("score", "versions", "trained", "base")
"""The columns that a narrow terminal leaves out, in this order."""


def adapter_folders(out: Path) -> list[Path]:
    """The adapters in ``out``, with a card or saved by plain PEFT."""
    return sorted({*folders_with(out, CARD), *folders_with(out, CONFIG)})


def summary_of(folder: Path) -> dict[str, Any]:
    """What is known of the adapter in ``folder`` at a glance; ``error`` says why nothing is."""
    found: dict[str, Any] = {"name": folder.name, "path": str(folder)}
    found["versions"] = len(versions_kept(folder))
    if not (folder / CARD).exists():
        return found | {"error": "no card: saved by plain PEFT, and not evaluated"}
    try:
        card = Card.read(folder)
        entry = card.adapter
        return found | {
            "domain": entry.domain,
            "base": card.base.id,
            "revision": card.base.revision,
            "precision": card.base.precision,
            "verdict": entry.verdict,
            "scale": entry.scale,
            **_score(entry),
            "general": _pooled(entry),
            "date": _date(card, folder),
            "trained_elsewhere": entry.trained_elsewhere,
            "sha256": entry.sha256,
            "complete": is_adapter(folder),
        }
    except AdapterCorrupt as error:
        return found | {"error": f"a damaged card: {error.found}"}


def _score(entry: AdapterEntry) -> dict[str, Any]:
    """Metric and score of the adapter, and of its base, on test or on validation rows."""
    if found := gained(entry):
        metric, fields = found
        return {"metric": metric, "score": fields["adapter"], "base_score": fields["base"],
                "rows": "test"}  # fmt: skip
    point = next((one for one in entry.scale_curve.get("points", ())
                  if one["scale"] == entry.scale != 1), None)  # fmt: skip
    if point is not None:
        return {"metric": entry.scale_curve["metric"], "score": point["score"],
                "base_score": entry.scale_curve["base"]["score"], "rows": "validation"}  # fmt: skip
    history, best = entry.training.get("history"), entry.training.get("best_epoch")
    record = next((one for one in history or () if one["epoch"] == best), None)
    if record is None:
        return {"metric": entry.metric, "score": None, "base_score": None, "rows": None}
    by_loss = not record["higher_is_better"] and record["score"] == record["validation_loss"]
    return {"metric": "loss" if by_loss else entry.metric, "score": record["score"],
            "base_score": None, "rows": "validation"}  # fmt: skip


def _pooled(entry: AdapterEntry) -> dict[str, float] | None:
    pooled = kept(entry)
    return {name: pooled[name] for name in ("base", "adapter")} if pooled else None


def _date(card: Card, folder: Path) -> str:
    """When the run of a card took place, in UTC; of an older card when its file was written."""
    if date := card.environment.get("date"):
        return str(date)
    written = datetime.fromtimestamp((folder / CARD).stat().st_mtime, UTC)
    return written.strftime("%Y-%m-%dT%H:%MZ")


def local_time(date: str) -> str:
    """``2026-11-26 20:18`` of a date in a card, in the time of this machine."""
    return datetime.fromisoformat(date).astimezone().strftime("%Y-%m-%d %H:%M")


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────


def adapters(console: Console, found: Sequence[Record]) -> None:
    """A row for each adapter; columns that do not fit are left out, the least important first.

    Another program gets all of them, unless ``COLUMNS`` says how many characters there are.
    """
    fitting = console.is_terminal or given_columns() > 0
    shown, rows = list(COLUMNS), [_cells(record) for record in found]
    table = _table(shown, rows)
    if fitting and _width(console, table) > console.width:
        rows = [row | {"base": row["base"].rpartition("/")[2]} for row in rows]
        table = _table(shown, rows)
    for column in LEAST_IMPORTANT:
        if not fitting or _width(console, table) <= console.width:
            break
        shown.remove(column)
        table = _table(shown, rows)
    _print(console, table)
    for record in found:
        if "error" in record:
            console.print(escape(f"{record['name']}: {record['error']}."), soft_wrap=True)


def versions(console: Console, found: Sequence[Record]) -> None:
    """A row for each version of an adapter, the oldest first."""
    rows = []
    for record in found:
        cells = _cells(record)
        time = local_time(record["date"]) if "date" in record else ""
        rows.append(cells | {"version": escape(record["name"]), "trained": time})
    _print(console, _table(["version", "trained", "verdict", "score"], rows))


def _cells(record: Record) -> dict[str, str]:
    """The cells of an adapter by column, as markup."""
    verdict = record.get("verdict")
    scale = record.get("scale", 1)
    unevaluated = UNEVALUATED if scale == 1 else f"not at scale {scale:g}"
    outcome = "–" if "error" in record else verdict or unevaluated
    colour = COLOURS.get(str(verdict), "dim")
    return {
        "adapter": escape(record["name"]),
        "verdict": f"[{colour}]{outcome}[/]",
        "score": escape(_in_words(record)),
        "trained": local_time(record["date"])[:10] if "date" in record else "",
        "versions": str(record["versions"] or "–"),
        "base": escape(str(record.get("base", "–"))),
    }


def _in_words(record: Record) -> str:
    """``F1 0.495 → 0.954``, or ``F1 0.912 in validation``."""
    score, metric = record.get("score"), record.get("metric")
    if score is None or metric is None:
        return ""
    if record["rows"] == "validation":
        return f"{metric_name(metric)} {score:.3f} in validation"
    return f"{metric_name(metric)} {record['base_score']:.3f} → {score:.3f}"


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _print(console: Console, table: Table) -> None:
    """The table; where no terminal limits it, each row is one line for another program."""
    if console.is_terminal:
        console.print(table)
        return
    whole = console.options.update(width=_width(console, table))
    console.print(Segments(console.render(table, whole)), soft_wrap=True, end="")
