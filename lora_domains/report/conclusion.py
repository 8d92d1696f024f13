"""What an evaluation comes to, in a sentence or two: what was found, and what to do next.

Every view of a card or a report begins with it. It is read off the gates, so it never claims more
than they decided.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_domains.report.card import AdapterEntry
from lora_domains.report.text import gained, kept, metric_name, number, percent
from lora_domains.verdict import best_baseline, contender_label, metric_info
from lora_domains.verdict.rules import capital

Fields = Mapping[str, Any]
Gates = Mapping[str, Fields]

PRETRAINED = {
    True: "a pretrained base: --base sentence-transformers/all-MiniLM-L6-v2 --head",
    False: "a pretrained base: --base Qwen/Qwen3-0.6B",
}
"""What to try in place of the embedded base, by whether the task can have a head."""
UNTRUSTED = {
    "frozen": "No figure of {} can be trusted.",
    "leaks": "No figure of {} can be trusted.",
    "effect": "{} cannot be used.",
}
"""Gates without which the other figures mean nothing."""
UNCHECKED = {
    "retention": "general knowledge",
    "leaks": "leaks into its training rows",
    "overfit": "overfitting",
    "identity": "whether it was made on this base",
}
"""What a gate that is not applicable leaves open; others go by their names."""
GENTLER = "train again with fewer --epochs or a lower --lr"
MORE_ROWS = "train on more rows or for fewer --epochs"
SWAPPED = 0.3
"""By how much recall, on average over classes, must rise in another order of labels."""
HOPELESS = "No realistic number"
"""What an inconclusive gate says that more rows would not decide (``rules.too_few``)."""
ADVICE = {
    "retention": GENTLER,
    "drift": GENTLER,
    "recall": "train on more {positive} rows, or set --target-recall",
    "precision": "train on more rows that resemble {positive} ones, or set --target-precision",
    "floors": "train on more rows of that label, or set --tune-thresholds",
    "slices": "train on more rows of the weak slice",
    "overfit": MORE_ROWS,
    "memorisation": MORE_ROWS,
}
"""What to do about a gate that fails."""


def conclusion(entry: AdapterEntry, since: Fields | None = None) -> str:
    """Whether the adapter beats the base and the best baseline, what it lost, and what to do.

    ``since`` is what changed from older adapters, where the report compares with some.
    """
    if not entry.gates:
        at = "" if entry.scale == 1 else f" at this scale ({entry.scale:g} of its trained effect)"
        return f"{entry.path} has not been evaluated{at}: there is no verdict."
    gates = {gate["name"]: gate for gate in entry.gates}
    for name, words in UNTRUSTED.items():
        if name in gates and gates[name]["verdict"] == "fail":
            return f"{words.format(entry.path)} {gates[name]['why']}"
    if order := _other_order(entry):
        return f"{_finding(entry, gates)}. {order}"
    action, worse = _action(entry, gates), _worse(entry, since) if since else ""
    if worse:  # what failed stays to be said; that an adapter passed is of no use then
        action = f"{action} {worse}" if entry.verdict == "fail" else worse
    return f"{_finding(entry, gates)}. {action}"


def standing(entry: AdapterEntry) -> str:
    """Base, best baseline and adapter on the metric that decides, in a line; empty without one."""
    found = gained(entry)
    if found is None:
        return ""
    metric, fields = found
    best = best_baseline(metric_info(metric), fields["baselines"])
    parts = [("base", fields["base"])]
    parts += [(_label(entry, best[0]), best[1])] if best else []
    scores = ", ".join(
        f"{name} {number(value)}" for name, value in [*parts, (entry.path, fields["adapter"])]
    )
    return f"{capital(metric_name(metric))} on {fields['n']:,} test rows: {scores}."


# ── What was found ──────────────────────────────────────────────────────────────────────────────


def _finding(entry: AdapterEntry, gates: Gates) -> str:
    """``medical beats TF-IDF (F1 0.948, +0.042) and keeps general knowledge; …``"""
    ahead, text = _gain(entry, gates)
    if ahead:  # what it costs matters where there is a gain
        text += _knowledge(entry, gates)
        text = "; ".join([text, *_mistakes(entry, gates), *_closer(entry)])
    names = [gate["name"] for gate in entry.gates if gate["verdict"] == "not applicable"]
    if names:
        what = _listed([UNCHECKED.get(name, name) for name in names])
        text += f"; {what} {'was' if len(names) == 1 else 'were'} not checked"
    return text


def _gain(entry: AdapterEntry, gates: Gates) -> tuple[bool, str]:
    """Whether the adapter is ahead of the base and the best baseline, and that in words."""
    found, rival = gained(entry), _rival(entry)
    if found is None or rival is None or "gain" not in gates:
        return False, f"{entry.path} was not compared with its base"
    metric, own, verdict = metric_info(found[0]), found[1]["adapter"], gates["gain"]["verdict"]
    name, value = _label(entry, rival[0]), rival[1]
    if metric.sign * (value - own) > 0:
        scores = f"{metric.label} {number(value)} against {number(own)}"
        does = "does" if verdict == "fail" else "seems to do"
        return False, f"{capital(name)} {does} better than {entry.path} ({scores})"
    if own == value and verdict != "fail":
        return False, f"{entry.path} scores the same as {name} ({metric.label} {number(own)})"
    beats = {"pass": "beats", "fail": "does not beat"}.get(verdict, "may beat")
    change = f"{metric.label} {number(own)}, {own - value:+.3f}"
    return verdict != "fail", f"{entry.path} {beats} {name} ({change})"


def _rival(entry: AdapterEntry) -> tuple[str, float] | None:
    """The best of the base and the baselines on the metric that decides, and its value."""
    found = gained(entry)
    if found is None:
        return None
    metric, fields = found
    return best_baseline(metric_info(metric), {"base": fields["base"], **fields["baselines"]})


def _label(entry: AdapterEntry, contender: str) -> str:
    if contender == "parent" and entry.parent is not None:
        return entry.parent.name
    return contender_label(contender)


def _knowledge(entry: AdapterEntry, gates: Gates) -> str:
    """`` and keeps general knowledge``; empty where that was not measured."""
    verdict = gates["retention"]["verdict"] if "retention" in gates else None
    if verdict == "pass":
        return " and keeps general knowledge"
    if verdict not in ("fail", "inconclusive"):
        return ""
    pooled = kept(entry)
    figures = pooled and f" ({percent(pooled['base'])} → {percent(pooled['adapter'])} correct)"
    if verdict == "inconclusive" and pooled and pooled["adapter"] >= pooled["base"]:
        return f"; too few questions to show that it keeps general knowledge{figures or ''}"
    loses = "loses" if verdict == "fail" else "may lose"
    return f" but {loses} general knowledge{figures or ''}"


def _mistakes(entry: AdapterEntry, gates: Gates) -> Iterator[str]:
    """Missed positives, and false alarms where there are too many; else all wrong answers."""
    if fields := entry.domain_scores.get("subset_accuracy"):
        wrong = round((1 - fields["adapter"]) * fields["n"])
        yield f"{wrong:,} of {fields['n']:,} rows have a label too many or too few"
    if not entry.confusion:
        return
    counts, positive = entry.confusion["adapter"], entry.positive_index
    if positive is None:
        total = sum(map(sum, counts))
        wrong = total - sum(row[i] for i, row in enumerate(counts))
        yield f"{wrong:,} of {total:,} answers are wrong"
        return
    label, right = entry.confusion["labels"][positive], counts[positive][positive]
    actual, called = sum(counts[positive]), sum(row[positive] for row in counts)
    yield f"{actual - right:,} of {actual:,} {label} rows are missed" + _required(gates, "recall")
    if required := _required(gates, "precision"):
        yield f"{called - right:,} of {called:,} rows called {label} are not{required}"


def _closer(entry: AdapterEntry) -> Iterator[str]:
    """Whose answers are closer to the references, where likelihoods decide."""
    found, fields = gained(entry), entry.domain_scores.get("token_f1")
    if found is None or fields is None or not metric_info(found[0]).nats:
        return
    metric, own = metric_info("token_f1"), fields["adapter"]
    best = best_baseline(metric, {"base": fields["base"], **fields["baselines"]})
    if best is not None and best[1] > own:
        scores = f"{metric.label} {number(best[1])} against {number(own)}"
        yield f"{_label(entry, best[0])} is closer to the references ({scores})"


def _required(gates: Gates, name: str) -> str:
    """`` (recall 0.612; 0.8 is required)`` where that gate fails."""
    gate = gates.get(name)
    if gate is None or gate["verdict"] != "fail":
        return ""
    return f" ({name} {number(gate['observed'])}; {gate['threshold']:g} is required)"


# ── What to do ──────────────────────────────────────────────────────────────────────────────────


def _action(entry: AdapterEntry, gates: Gates) -> str:
    failed, undecided, unchecked = (
        [name for name, gate in gates.items() if gate["verdict"] == verdict]
        for verdict in ("fail", "inconclusive", "not applicable")
    )
    if failed:
        return _instead(entry, failed)
    if "evaluations" in undecided:
        return f"Not proven: {gates['evaluations']['why']}"
    hopeless = [name for name in undecided if HOPELESS in gates[name]["why"]]
    if "gain" in hopeless and not _gain(entry, gates)[0]:
        return f"{_rather(entry)}: no realistic number of rows would show a gain."
    if undecided:
        are, say = ("is", "its gate says") if len(undecided) == 1 else ("are", "their gates say")
        why = f"; {say} below what would decide it"
        if hopeless == undecided:
            why = ": no realistic number of rows would decide it"
        return f"Not proven yet: {_listed(undecided)} {are} inconclusive{why}."
    if {"leaks", "identity"}.intersection(unchecked):
        return "Ship it if it was not trained on these test rows."
    if _unread(entry):
        return "No answer was generated: read those of predict before you ship it."
    return "Read its answers before you ship it." if [*_closer(entry)] else "Ship it."


def _unread(entry: AdapterEntry) -> bool:
    """Whether only the likelihoods of right answers were measured, of a chat, whose own count."""
    found, task = gained(entry), entry.declared_task
    likelihoods = found is not None and bool(metric_info(found[0]).nats)
    chat = task is not None and task.converses and task.scored_by == "likelihood"
    return likelihoods and chat


def replaced(entry: AdapterEntry, since: Fields) -> str:
    """Whether the adapter is worse than the version that it replaced, or better, in a sentence.

    ``since`` is that of ``regressions.since_replaced``. Without a clear difference it says so.
    """
    if worse := _worse(entry, since):
        return worse
    figures = since["adapters"][entry.path]["figures"]
    better = {name: change for name, change in figures.items() if _is_better(name, change)}
    older, shown = f"{since['report']}, which it replaced", "; ".join(_changed(better or figures))
    if better:
        return f"{entry.path} is better than {older} ({shown})."
    return f"{entry.path} shows no clear difference from {older}" + (
        f" ({shown})." if shown else "."
    )


def _is_better(name: str, change: Fields) -> bool:
    """Whether even the worse bound of a change is a gain."""
    sign = 1 if name == "general" else metric_info(name).sign
    bound = change["lower"] if sign > 0 else change["upper"]
    return bound is not None and sign * bound > 0


def _changed(figures: Mapping[str, Fields]) -> list[str]:
    """``F1 0.980 → 0.914`` for each figure."""
    return [
        f"{'general knowledge' if name == 'general' else metric_name(name)}"
        f"{'' if change['paired'] else ', gain over the base'} {number(change['before'])} → "
        f"{number(change['now'])}"
        for name, change in figures.items()
    ]


def _worse(entry: AdapterEntry, since: Fields) -> str:
    """That the adapter is worse than an older one of its name; empty where it is not."""
    changes = since["adapters"].get(entry.path) or {"figures": {}}
    worse = _changed({name: one for name, one in changes["figures"].items() if one["worse"]})
    if not worse:
        return ""
    figures, older = "; ".join(worse), since["report"]
    if number_of := since.get("version"):
        then = f"lora-domains rollback {entry.path} {number_of}"
        older = f"{older}, which it replaced"
        return f"{entry.path} is worse than {older} ({figures}); to restore that: {then}."
    return f"{entry.path} is worse than the one in {older} ({figures}): keep that one."


def _other_order(entry: AdapterEntry) -> str:
    """That the labels of a head from elsewhere seem to be in another order; else empty."""
    task = entry.declared_task
    if not (entry.trained_elsewhere and entry.confusion and task is not None and task.head):
        return ""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    counts = np.array(entry.confusion["adapter"], dtype=float)
    recalls = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # by class: most rows are of one
    true, called = linear_sum_assignment(recalls, maximize=True)
    if recalls[true, called].sum() - recalls.trace() < SWAPPED * len(counts):
        return ""
    labels, total = entry.confusion["labels"], counts.sum()
    order = ",".join(labels[true[called.tolist().index(at)]] for at in range(len(labels)))
    flag = "" if any("," in label for label in labels) else f" (--labels {shlex.quote(order)})"
    return (
        f"Check the order of its labels first: in another one{flag} it would be right on "
        f"{percent(counts[true, called].sum() / total)} of these rows in place of "
        f"{percent(counts.trace() / total)}."
    )


def _instead(entry: AdapterEntry, failed: Sequence[str]) -> str:
    """What to do about the gates that failed."""
    others = [name for name in failed if name != "gain"]
    if "gain" in failed:
        also = f" It also fails {_listed(others)}." if others else ""
        return f"{_rather(entry)}.{also}"
    advice = next((ADVICE[name] for name in failed if name in ADVICE), "")
    advice = advice and "; " + advice.format(positive=entry.judged.get("positive"))
    return f"Do not ship it: it fails {_listed(failed)}{advice}."


def _rather(entry: AdapterEntry) -> str:
    """What to use, or to try, where the adapter does not beat something cheaper."""
    rival = _rival(entry)
    if rival is not None and rival[0] == "parent":
        return f"Keep {_label(entry, 'parent')}"
    larger = "training on more rows or on a larger --base"
    task = entry.declared_task
    headed = task is not None and task.with_head() is not None
    other = PRETRAINED[headed] if entry.judged.get("embedded_base") else larger
    if rival is None or rival[0] == "majority":
        return f"Do not ship it; try {other}"
    return f"Use {_label(entry, rival[0])}, or try {other}"


def _listed(names: Sequence[str]) -> str:
    """``gain``, ``gain and recall``, ``gain, recall and precision``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
