"""Markdown views: a report for a job summary or a pull-request comment, an adapter's figures."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_domains.report.card import AdapterEntry, Report
from lora_domains.report.conclusion import conclusion, standing
from lora_domains.report.text import (
    INFORMS,
    SIGNS,
    calibrated,
    counted,
    decided_by,
    decisive,
    evaluations_of,
    gained,
    headline,
    how_scored,
    interval,
    kept,
    memorised,
    metric_name,
    nats_of,
    number,
    open_gates,
    outcome,
    percent,
    points,
    precision_elsewhere,
    ranked,
    without_near_leaks,
    worsened,
)
from lora_domains.verdict import contender_label

if TYPE_CHECKING:
    pass

# GitHub's limits: a job summary in bytes, a comment in characters (bytes are never fewer).
SUMMARY, COMMENT = 1024 * 1024, 65_536
FEW = 8
"""So many adapters are concluded on before the table; the details hold the conclusion on each."""


def escaped(text: object) -> str:
    """``text`` escaped: no part of it becomes HTML, a table, a link or a mention."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is literal: macro_f1 stays as it is.
    flat = re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", flat)
    return flat.replace("@", "@\u200b").replace("://", ":\u200b//")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty line."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


def conclusion_of(entry: AdapterEntry, since: Mapping[str, Any] | None = None) -> list[str]:
    """What the evaluation comes to, then base, best baseline and adapter in a line."""
    lines = [f"**{escaped(conclusion(entry, since))}**", ""]
    return lines + ([escaped(scored), ""] if (scored := standing(entry)) else [])


def measured(entry: AdapterEntry) -> list[str]:
    """The verdict, its gates and all figures under headings; nothing before an evaluation."""
    if entry.verdict is None:
        return []
    lines = [f"## Verdict: {entry.verdict}", "", *_gates(entry)]
    for title, part in (
        ("On test rows", _scores(entry)),
        ("General knowledge", _general(entry)),
        ("Per class", _classes(entry)),
        ("Slices", _slices(entry)),
        ("Seeds", _seeds(entry)),
        ("Reliability", _reliability(entry)),
    ):
        lines += [f"## {title}", "", *part] if part else []
    return lines


def _gates(entry: AdapterEntry) -> list[str]:
    """The gates that decide, then those that inform."""
    lines: list[str] = []
    for heading, gates in zip((None, INFORMS), decisive(entry.gates), strict=True):
        rows = [
            [escaped(g["name"]), f"{SIGNS[g['verdict']]} {g['verdict']}", escaped(g["why"])]
            for g in gates
        ]
        if rows:
            lines += [heading, ""] if heading else []
            lines += table(["gate", "verdict", "why"], rows)
    return lines


def _scores(entry: AdapterEntry) -> list[str]:
    """The table of metrics, and the same without near leaks."""
    if not entry.domain_scores:
        return []
    n = next(iter(entry.domain_scores.values()))["n"]
    lines = [
        *_table_of_scores(entry.domain_scores),
        f"{n} rows, the same for all contenders; bounds are one-sided, 95 %. "
        + escaped(how_scored(entry)),
        "",
    ]
    if entry.without_near_leaks:
        lines += [without_near_leaks(entry), "", *_table_of_scores(entry.without_near_leaks)]
    return lines


def _table_of_scores(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(n for fields in scores.values() for n in fields["baselines"]))
    rows = []
    for metric, fields in scores.items():
        middle = [fields["baselines"].get(name) for name in names]
        shown = [number(v) for v in (fields["base"], *middle, fields["adapter"])]
        rows.append([escaped(metric_name(metric)), *shown, interval(fields)])
    head = [
        "metric",
        "base",
        *(escaped(contender_label(name)) for name in names),
        "adapter",
        "adapter − base (95 % bounds)",
    ]
    return table(head, rows)


def _general(entry: AdapterEntry) -> list[str]:
    rows = [
        [
            f"{escaped(suite)} ({nats_of(entry) if suite == 'nats' else 'accuracy'})",
            number(fields["base"]),
            number(fields["adapter"]),
            interval(fields),
            str(fields["n"]),
        ]
        for suite, fields in entry.general.items()
        if "difference" in fields
    ]
    return table(["suite", "base", "adapter", "difference", "items"], rows) if rows else []


def _classes(entry: AdapterEntry) -> list[str]:
    rows = [
        [escaped(label), *(number(row[k]) for k in ("precision", "recall", "f1")),
         str(row["support"])]
        for label, row in entry.per_class.items()
    ]  # fmt: skip
    return table(["class", "precision", "recall", "F1", "rows"], rows) if rows else []


def _slices(entry: AdapterEntry) -> list[str]:
    rows = [
        [escaped(f"{column} = {value}"), str(fields["n"]), number(fields["base"]),
         number(fields["adapter"]), interval(fields)]
        for column, values in entry.slices.items()
        for value, scores in values.items()
        for fields in scores.values() if fields
    ]  # fmt: skip
    return table(["slice", "rows", "base", "adapter", "difference"], rows) if rows else []


def _seeds(entry: AdapterEntry) -> list[str]:
    rows = [
        [escaped(metric_name(metric)), str(fields["runs"]), interval(fields),
         number(fields["sd_seed"], 4), number(fields["se_items"], 4)]
        for metric, fields in entry.seeds.items()
    ]  # fmt: skip
    head = ["adapter − base", "seeds", "mean (95 % bounds for another seed)", "sd between seeds",
            "s.e. by items"]  # fmt: skip
    on = next((f"On the same {f['n']} {f['rows']} rows." for f in entry.seeds.values()
               if "rows" in f), "")  # fmt: skip
    return [*([on, ""] if on else []), *table(head, rows)] if rows else []


def _reliability(entry: AdapterEntry) -> list[str]:
    """Earlier evaluations, calibration, the threshold and memorisation, a sentence each."""
    sentences = [
        f"- {title}: {escaped(words(getattr(entry, key)))}."
        for key, title, words in (
            ("evaluations", "Test set", evaluations_of),
            ("calibration", "Confidence", calibrated),
            ("curve", "Decision", decided_by),
            ("curve", "Prevalence", precision_elsewhere),
            ("memorisation", "Memorisation", memorised),
        )
        if getattr(entry, key) and words(getattr(entry, key))
    ]
    return [*sentences, ""] if sentences else []


# ── A report ────────────────────────────────────────────────────────────────────────────────────


def comment(report: Report) -> str:
    """``summary`` within the limit of a comment."""
    return summary(report, COMMENT)


def summary(report: Report, limit: int = SUMMARY) -> str:
    """A report within ``limit`` bytes: conclusion, what got worse, a row per adapter, details.

    Adapters that fail come first. What does not fit is counted, never cut in the middle.
    """
    base = report.base
    entries = ranked(report)
    lines = [f"## {SIGNS[outcome(report)]} {escaped(headline(report))}", ""]
    if len(entries) == 1:
        lines += conclusion_of(entries[0], report.since)
    lines += [
        f"{counted(report)} Base {escaped(base.id)}, {base.precision}.",
        "",
    ]
    if report.since:
        lines += _since(report.since)
    end = "\nEverything else is in report.html and report.json.\n"
    room = limit - len(end.encode())
    text = "\n".join([*lines, ""])
    concluded = [
        f"- {SIGNS[entry.outcome]} {escaped(conclusion(entry, report.since))}"
        for entry in entries if 1 < len(entries) <= FEW
    ]  # fmt: skip
    head = table(
        ["adapter", "verdict", "gain over the base", "general knowledge", "gates not passed"], []
    )
    details = ["\n".join(_details(entry, report.since)) for entry in entries]
    blocks = [
        ("conclusions", [], concluded),
        ("adapters in the table", ["", *head], [_row(entry) for entry in entries]),
        ("adapters in detail", [""], details),
    ]
    for left, (what, head, parts) in zip((2, 1, 0), blocks, strict=True):
        text += "\n".join(head).rstrip("\n") + "\n" if head else ""
        text = _filled(text, parts, what, room - 200 * left)
    return text.rstrip("\n") + "\n" + end


def _filled(text: str, parts: Sequence[str], what: str, room: int) -> str:
    """``text`` with as many ``parts`` as fit, and the number of those that do not."""
    used = len(text.encode()) + 80  # what the line below takes
    for done, part in enumerate(parts):
        used += len(part.encode()) + 1
        if used > room:
            return text + f"\n{len(parts) - done} more {what} do not fit here.\n"
        text += part + "\n"
    return text


def _since(since: Mapping[str, Any]) -> list[str]:
    sentences = worsened(since)
    title = "Worse" if since["worse"] else "Nothing clearly worse"
    lines = [f"### {title} since {escaped(since['report'])}", ""]
    return [*lines, *(f"- {escaped(sentence)}" for sentence in sentences), ""]


def _row(entry: AdapterEntry) -> str:
    found, general = gained(entry), kept(entry)
    gain = "not measured"
    if found:
        metric, fields = found
        gain = (
            f"{escaped(metric_name(metric))} {number(fields['base'])} → "
            f"**{number(fields['adapter'])}**, {interval(fields)}"
        )
    know = "not measured"
    if general:
        know = f"{percent(general['base'])} → {percent(general['adapter'])}, {points(general)}"
    names = [gate["name"] for gate in open_gates(entry)]
    names += [f"{gate['name']} (warning)" for gate in entry.gates if gate["verdict"] == "warning"]
    gates = ", ".join(map(escaped, names)) or "–"
    sign = f"{SIGNS[entry.outcome]} {entry.outcome}"
    return f"| {escaped(entry.path)} | {sign} | {gain} | {know} | {gates} |"


def _details(entry: AdapterEntry, since: Mapping[str, Any] | None) -> list[str]:
    opened = " open" if entry.verdict == "fail" else ""
    title = f"{SIGNS[entry.outcome]} {escaped(entry.path)}: gates and figures"
    return [
        f"<details{opened}><summary>{title}</summary>", "",
        *conclusion_of(entry, since), *(_gates(entry) if entry.gates else []),
        *_scores(entry), *_general(entry), *_classes(entry), *_slices(entry), *_seeds(entry),
        *_reliability(entry),
        "</details>", "",
    ]  # fmt: skip
