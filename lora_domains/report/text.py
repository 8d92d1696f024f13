"""Reports in words: outcome, headline, reasons, figures with their bounds.

The terminal, Markdown, HTML and JUnit take their sentences from here, so that they agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_domains.errors import number_of
from lora_domains.report.card import AdapterEntry, Report
from lora_domains.verdict import INFO, metric_info
from lora_domains.verdict.rules import INFORMING, WORST_FIRST, capital

SIGNS = {"pass": "✔", "fail": "✘", "inconclusive": "?", "not applicable": "–", "warning": "!",
         "note": "·"}  # fmt: skip
INFORMS = "These inform and decide nothing:"
"""Stands between the gates that decide and those that inform."""
Fields = Mapping[str, Any]


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(fields: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """``+0.21 (+0.17 to +0.25)``: a difference and its one-sided 95 % bounds; ``?`` for none."""
    d, low, high = (
        "?" if fields[k] is None else f"{scale * fields[k]:+.{digits}f}"
        for k in ("difference", "lower", "upper")
    )
    return f"{d} ({low} to {high})"


def setting_name(name: str) -> str:
    """``lr`` of ``training.lr``."""
    return name.rpartition(".")[2]


def setting_value(value: Any) -> str:
    """The value of a setting, as people read it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "derived" if value is None else str(value)


def chosen_among(training: Mapping[str, Any]) -> str:
    """That an adapter is the best of a sweep, and by what; empty where it is not."""
    found = training.get("chosen_among")
    if not found:
        return ""
    swept = ", ".join(map(setting_name, found["runs"][0]["settings"]))
    return (
        f"Chosen among {len(found['runs'])} trainings that differ in {swept}, by "
        f"{metric_name(found['metric'])} on {found['rows']:,} validation rows"
    )


def points(fields: Mapping[str, Any]) -> str:
    """A difference of shares in points: ``+4.5 (+4.1 to +4.9)``."""
    return interval(fields, 100, 1)


def change(metric: str, fields: Mapping[str, Any]) -> str:
    """A difference of ``metric`` in points, or in nats or its own unit where it is not a share."""
    found = metric_info(metric)
    if found.own_unit:
        return interval(fields)
    return f"{interval(fields)} nats" if found.nats else points(fields)


def metric_name(metric: str) -> str:
    """``macro_f1`` → ``macro F1``."""
    return INFO[metric].label if metric in INFO else metric.replace("_", " ")


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


def gained(entry: AdapterEntry) -> tuple[str, Mapping[str, Any]] | None:
    """The metric that decides, and its figures; None where the adapter was not evaluated."""
    metric = entry.judged.get("metric", "")
    fields = entry.domain_scores.get(metric)
    return (metric, fields) if fields else None


def in_brief(entry: AdapterEntry) -> str:
    """``pass, F1 0.495 → 0.954``: the verdict and the metric that decides."""
    found = gained(entry)
    if found is None:
        return "not evaluated"
    metric, fields = found
    return (
        f"{entry.outcome}, {metric_name(metric)} {number(fields['base'])} → "
        f"{number(fields['adapter'])}"
    )


def kept(entry: AdapterEntry) -> Mapping[str, Any] | None:
    """General knowledge, all probes pooled; None where none was scored."""
    return entry.general.get("pooled")


def open_gates(entry: AdapterEntry) -> list[Mapping[str, Any]]:
    """The gates that keep an adapter from shipping, failed ones first."""
    gates = [gate for gate in entry.gates if gate["verdict"] in WORST_FIRST[:2]]
    return sorted(gates, key=lambda gate: WORST_FIRST.index(gate["verdict"]))


def decisive(gates: Sequence[Fields]) -> tuple[list[Fields], list[Fields]]:
    """The gates that decide, and those that inform."""
    informing = [gate for gate in gates if gate["verdict"] in INFORMING]
    return [gate for gate in gates if gate["verdict"] not in INFORMING], informing


# ── Other findings about one adapter ────────────────────────────────────────────────────────────


def evaluations_of(evaluations: Fields) -> str:
    """This evaluation among all those of its test set (``verdict.ledger``)."""
    from lora_domains.verdict.ledger import Standing

    return str(Standing(**evaluations)).removesuffix(".")


def with_bounds(figures: Fields, key: str, bounds: Fields) -> str:
    """``0.021 (0.010 to 0.034)``: a figure and its bounds."""
    return f"{number(figures[key])} ({number(bounds['lower'])} to {number(bounds['upper'])})"


def calibrated(calibration: Fields) -> str:
    """How reliable the confidence is (``stats.calibration``)."""
    bounds = calibration["bounds"]
    ece, brier = (with_bounds(calibration, key, bounds[key]) for key in ("ece", "brier"))
    return f"expected calibration error {ece}, Brier score {brier}; 0 is best"


def memorised(memorisation: Fields) -> str:
    """How well training rows are told from test rows (``Evidence.membership``)."""
    auc = with_bounds(memorisation, "auc", memorisation)
    each = [f"{number(memorisation[key])} {words}" for key, words in
            (("loss", "by the loss"), ("calibrated", "by what the adapter gained on each row"))
            if key in memorisation]  # fmt: skip
    by = f" ({' and '.join(each)})" if each else ""
    rows = f"{memorisation['train']} training and {memorisation['test']} test rows"
    return f"membership-inference AUC {auc}{by} on {rows}; 0.5 is chance"


def decided_by(curve: Fields) -> str:
    """From which probability the positive class is predicted, and how that was chosen."""
    if "targets" not in curve:
        return f"{curve['positive']} is predicted where it is the most likely class"
    ((name, target),) = curve["targets"].items()
    if curve["threshold"] is None:
        return (
            f"no validation row is {curve['positive']}, so none chose a threshold: it is predicted "
            "where it is the most likely class"
        )
    chosen = (
        f"{curve['positive']} is predicted from a probability of {number(curve['threshold'])}, "
        f"chosen on validation rows for {name} {target:g}"
    )
    if "lower" not in curve:
        return chosen
    shown = (
        f"{name} is at least {number(curve['lower'])} with {100 * curve['level']:g} % confidence"
    )
    if curve["lower"] >= target:
        return f"{chosen}: there {shown}"
    return f"{chosen}, which they are too few to show: {shown}"


def without_near_leaks(entry: AdapterEntry) -> str:
    """The heading of the scores without near leaks."""
    whole, clean = (next(iter(scores.values()))["n"]
                    for scores in (entry.domain_scores, entry.without_near_leaks))  # fmt: skip
    near = number_of(whole - clean, "row")
    return f"Without {near} nearly the same as a training row, on the other {clean:,}:"


SHOWN_AT = (0.1, 0.05, 0.01)
"""Shares of positives at which precision is said where the domain declares none."""


def precision_elsewhere(curve: Fields) -> str:
    """Precision where another share of the rows is positive than among the test rows.

    Empty for a card without it, and where no test row was predicted positive.
    """
    found = curve.get("prevalence") or {"points": []}
    known = {p["prevalence"]: p for p in found["points"] if p["precision"] is not None}
    if not known:
        return ""
    own, declared = found["test"], found["declared"]
    shares = [share for share in SHOWN_AT if share < own] if declared is None else [declared]
    restated = ", ".join(
        f"{with_bounds(known[share], 'precision', known[share])} where {100 * share:.3g} % are"
        for share in shares
    )
    here = (
        f"precision is {number(known[own]['precision'])} where {100 * own:.3g} % of the rows are "
    )
    return f"{here}{curve['positive']}, as in the test rows" + (
        f"; it would be {restated}" if restated else ""
    )


def most_confused(confusion: Fields) -> list[tuple[int, str, str]]:
    """The adapter's mistakes as (rows, true label, predicted label), most frequent first."""
    labels = confusion["labels"]
    pairs = [
        (count, labels[i], labels[j])
        for i, row in enumerate(confusion["adapter"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


# ── All adapters of a report ────────────────────────────────────────────────────────────────────


def ranked(report: Report) -> list[AdapterEntry]:
    """The adapters, failing ones first, otherwise in the order in which they were given."""
    return sorted(report.adapters, key=lambda entry: WORST_FIRST.index(entry.outcome))


def outcome(report: Report) -> str:
    """The worst verdict; ``fail`` too when something got worse since the older report."""
    if report.since and report.since["worse"]:
        return "fail"
    verdicts = {entry.outcome for entry in report.adapters}
    return next(verdict for verdict in WORST_FIRST if verdict in verdicts)


def headline(report: Report) -> str:
    """What to do, in a few words: ``Ship medical``, ``Do not ship: 1 of 5 fails``."""
    verdicts = [entry.outcome for entry in report.adapters]
    many = len(verdicts)
    what = report.adapters[0].path if many == 1 else f"all {many} adapters"
    failing, unsure = verdicts.count("fail"), verdicts.count("inconclusive")
    if failing:
        short = f"{failing} of {many} {'fails' if failing == 1 else 'fail'}"
        return f"Do not ship {what}" if many == 1 else f"Do not ship: {short}"
    if report.since and outcome(report) == "fail":
        return f"Do not ship: worse than {report.since['report']}"
    if unsure:
        short = f"{unsure} of {many} {'is' if unsure == 1 else 'are'} inconclusive"
        return f"Not proven yet: {what if many == 1 else short}"
    return f"Ship {what}"


def counted(report: Report) -> str:
    """``3 adapters: 1 fails, 2 pass.``"""
    verdicts = [entry.outcome for entry in report.adapters]
    words = {"fail": ("fails", "fail"), "inconclusive": ("is inconclusive", "are inconclusive"),
             "pass": ("passes", "pass")}  # fmt: skip
    parts = [
        f"{count} {words[verdict][count > 1]}"
        for verdict in WORST_FIRST
        if (count := verdicts.count(verdict))
    ]
    return f"{number_of(len(verdicts), 'adapter')}: {', '.join(parts)}."


def reasons(entry: AdapterEntry) -> list[str]:
    """Why an adapter does not pass: a sentence for each gate that did not."""
    if not entry.gates:
        return ["It has not been evaluated: there is no verdict."]
    return [f"{gate['name']}: {gate['why']}" for gate in open_gates(entry)]


def worsened(since: Fields) -> list[str]:
    """What got worse since the older adapters, a sentence each; then what may have got worse."""
    worse: list[str] = []
    open_: list[str] = []
    for name, found in since["adapters"].items():
        for figure, fields in found["figures"].items():
            if fields["worse"]:
                rows = "on the same rows" if fields["paired"] else "gain (on other rows)"
                sign = "" if fields["paired"] else "+"
                worse.append(
                    f"{name}: {metric_name(figure)} {rows} went from {fields['before']:{sign}.3f} "
                    f"to {fields['now']:{sign}.3f}, worse by at least {_nearest(fields):.3f} "
                    "(with 95 % confidence for all figures together)."
                )
        for gate in found["gates"]:
            sentence = f"{name}: gate {gate['name']} went from {gate['before']} to {gate['now']}."
            (worse if gate["worse"] else open_).append(sentence)
    open_ += [f"{name} is missing from this report." for name in since["missing"]]
    return worse + open_


def _nearest(fields: Mapping[str, Any]) -> float:
    """The size of the bound that is nearest to no change."""
    return float(min(abs(fields["lower"]), abs(fields["upper"])))


def how_scored(entry: AdapterEntry) -> str:
    """The unit of the loss, on test rows and in the table of epochs; how answers are made."""
    from lora_domains.tasks import Task

    task = entry.declared_task
    trained = task.loss_unit if task and task.head else (task or Task).trained_unit
    judged = entry.judged.get("loss") or trained
    if entry.trained_elsewhere:
        loss = f"The loss is {judged}."
    elif judged == trained:
        loss = f"The loss is {judged}, here and in the table of epochs."
    else:
        loss = f"The loss is {judged}; in the table of epochs it is {trained}."
    counts = {metric: fields["n"] for metric, fields in entry.domain_scores.items()}
    rows = max(counts.values(), default=0)
    some = [f"{capital(metric_name(metric))} is on {n:,} of the rows."
            for metric, n in counts.items() if n < rows]  # fmt: skip
    return " ".join([loss, *some, *_answers(entry.judged)])


def _answers(judged: Fields) -> list[str]:
    """How answers were generated, and who judged them."""
    sentences = []
    if decoding := judged.get("decoding"):
        ends = " or ".join(decoding["stop"])
        most = decoding["max_new_tokens"]
        sentences.append(
            f"Answers are {decoding['method']}, of {most} tokens at most, and end at {ends}."
        )
    if judge := judged.get("judge"):
        scale = f"{judge['low']:g} to {judge['high']:g}"
        told = "" if (judge["low"], judge["high"]) == (0, 1) else f" (here {scale} is 0 to 1)"
        sentences.append(f"The judge is {judge['command']}{told}.")
    return sentences


def nats_of(entry: AdapterEntry) -> str:
    """The unit of nats on general text."""
    masked = entry.judged.get("knowledge") == "masked tokens"
    return "nats per masked token" if masked else "nats per token"
