"""Cards and reports: their shape, how they are read, rebuilt from items, and shown as Markdown.

``card.json`` and ``report.json`` have one shape (DESIGN.md, "On disk"; ``figures`` says what more
an entry holds); a card has one adapter.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_domains.errors import AdapterCorrupt
from lora_domains.figures import summarise

SCHEMA = 1
CARD, ITEMS = "card.json", "items.jsonl"
VERDICTS = {"pass": "✔ pass", "fail": "✘ fail", "inconclusive": "? inconclusive"}


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
            mend="Copy the adapter folder again, or remove card.json to load it unverified.",
        )
    if card.get("schema") != SCHEMA:
        raise AdapterCorrupt(
            where=where,
            expected=f"schema {SCHEMA}",
            found=f"schema {card.get('schema')!r}",
            mend="Update lora-domains to read it.",
        )
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
            mend="Evaluate the adapter again, or copy its folder again.",
        ) from None


def figures(entry: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An adapter's figures, gates and verdict, from its items and the rules its card declares."""
    from lora_domains.domain import Gates

    judged = entry["judged"]
    return summarise(
        items,
        kind=entry["settings"]["task"]["kind"],
        metric=judged["metric"],
        labels=judged["labels"],
        positive=judged["positive"],
        gates=Gates(**entry["settings"]["gates"]),
        leaks=entry["leaks"],
        base_changed=judged["base_changed"],
        largest_move=judged["largest_move"],
        looks=entry.get("looks"),
        threshold=judged.get("threshold"),
    )


def rebuild(folder: Path) -> dict[str, Any]:
    """The card again, its figures computed anew from ``items.jsonl``, without a model or torch."""
    card = read_card(folder)
    entry = card["adapters"][0]
    if "judged" in entry:
        entry.update(figures(entry, read_items(folder)))
    return card


# ── Markdown: the adapter's README ──────────────────────────────────────────────────────────────


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(fields: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """``+0.21 (+0.17 to +0.25)``: a difference, its one-sided 95 % bounds; ``?`` where none."""
    d, low, high = (
        "?" if fields[k] is None else f"{scale * fields[k]:+.{digits}f}"
        for k in ("difference", "lower", "upper")
    )
    return f"{d} ({low} to {high})"


def markdown(card: Mapping[str, Any]) -> str:
    """The README of an adapter folder: front matter for the Hub, verdict first, how to load it."""
    entry, base = card["adapters"][0], card["base"]
    front = [
        "---",
        f"base_model: {base['id']}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"tags: [lora, lora_domains, {entry['domain']}]",
        *([f"license: {base['licence']}"] if base["licence"] else []),
        "---",
    ]
    body = [
        f"# {entry['domain']}",
        "",
        f"A LoRA adapter for `{base['id']}`, trained and measured by lora_domains.",
        "",
    ]
    if "verdict" not in entry:
        body += ["It has not been evaluated yet: there is no verdict.", ""]
    else:
        body += [f"**Verdict: {entry['verdict']}**", "", *_gates(entry), *_scores(entry)]
        body += [*_general(entry), *_classes(entry)]
    body += _training(entry) + _loading(entry)
    return "\n".join([*front, "", *body]).rstrip() + "\n"


def _gates(entry: Mapping[str, Any]) -> list[str]:
    rows = [f"| {g['name']} | {g['verdict']} | {g['why']} |" for g in entry["gates"]]
    return ["| gate | verdict | why |", "|---|---|---|", *rows, ""]


def _scores(entry: Mapping[str, Any]) -> list[str]:
    scores = entry["domain_scores"]
    names = list(dict.fromkeys(n for fields in scores.values() for n in fields["baselines"]))
    lines = [
        "## On rows it was not trained on",
        "",
        "| metric | "
        + " | ".join(["base", *names, "adapter", "adapter − base (95 % bounds)"])
        + " |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for metric, fields in scores.items():
        middle = [fields["baselines"].get(n) for n in names]
        cells = [fields["base"], *middle, fields["adapter"]]
        shown = ["–" if c is None else f"{c:.3f}" for c in cells]
        lines.append(f"| {metric} | " + " | ".join(shown) + f" | {interval(fields)} |")
    n = next(iter(scores.values()))["n"]
    return [*lines, "", f"{n} items, the same for all; each bound is one-sided 95 %.", ""]


def _general(entry: Mapping[str, Any]) -> list[str]:
    general = entry["general"]
    lines = []
    for suite, fields in general.items():
        if "difference" in fields:
            what = "nats per token" if suite == "nats" else "accuracy"
            lines.append(
                f"| {suite} ({what}) | {fields['base']:.3f} | {fields['adapter']:.3f} "
                f"| {interval(fields)} | {fields['n']} |"
            )
    if not lines:
        return []
    head = ["## General knowledge", "", "| suite | base | adapter | difference | items |",
            "|---|---|---|---|---|"]  # fmt: skip
    return [*head, *lines, ""]


def _classes(entry: Mapping[str, Any]) -> list[str]:
    classes = entry.get("per_class")
    if not classes:
        return []
    lines = [
        "## Per class",
        "",
        "| class | precision | recall | F1 | rows |",
        "|---|---|---|---|---|",
    ]
    for label, row in classes.items():
        lines.append(
            f"| {label} | {row['precision']:.3f} | {row['recall']:.3f} "
            f"| {row['f1']:.3f} | {row['support']} |"
        )
    return [*lines, ""]


def _training(entry: Mapping[str, Any]) -> list[str]:
    training, ledger, leaks = entry["training"], entry["ledger"], entry["leaks"]
    return [
        "## Training",
        "",
        f"{training['epochs']} epochs, {training['steps']} steps, {training['seconds']:.0f} s; "
        f"best epoch {training['best_epoch']}. {ledger['read']} rows read, "
        f"{ledger['refused']} refused, {ledger['duplicates']} duplicates, "
        f"{ledger['truncated']} truncated, {ledger['supervised_tokens']} supervised tokens. "
        f"Leaks: {leaks['exact']} exact, {leaks['near']} near.",
        "",
    ]


def _loading(entry: Mapping[str, Any]) -> list[str]:
    return [
        "## Loading",
        "",
        "```python",
        "from lora_domains import DomainModel",
        "",
        'model = DomainModel.from_pretrained("the base named above")',
        f'model.load_adapter("path/to/{entry["path"]}")',
        "```",
        "",
        "or plain PEFT: `PeftModel.from_pretrained(base, path)`.",
    ]
