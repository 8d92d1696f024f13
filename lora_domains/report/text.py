"""A report in words: its outcome, its headline, names of metrics, figures with their intervals.

Terminal, Markdown, HTML and JUnit say the same thing because they ask here.
"""

from collections.abc import Mapping
from typing import Any

from lora_domains.report.card import AdapterEntry, Report
from lora_domains.verdict.metrics import METRICS, metric_named

SIGNS = {"pass": "✔", "fail": "✘", "inconclusive": "?", "not applicable": "–"}
WORST_FIRST = ("fail", "inconclusive", "pass")
Fields = Mapping[str, Any]


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(fields: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """``+0.21 (+0.17 to +0.25)``: a difference, its one-sided 95 % bounds; ``?`` where none."""
    d, low, high = (
        "?" if fields[k] is None else f"{scale * fields[k]:+.{digits}f}"
        for k in ("difference", "lower", "upper")
    )
    return f"{d} ({low} to {high})"


def points(fields: Mapping[str, Any]) -> str:
    """A difference of shares in points: ``+4.5 (+4.1 to +4.9)``."""
    return interval(fields, 100, 1)


def change(metric: str, fields: Mapping[str, Any]) -> str:
    """A difference of ``metric`` in points, or in nats where it is no share."""
    return f"{interval(fields)} nats" if metric_named(metric).nats else points(fields)


def metric_name(metric: str) -> str:
    """``macro_f1`` → ``macro F1``."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


def gained(entry: AdapterEntry) -> tuple[str, Mapping[str, Any]] | None:
    """The metric an adapter is judged on, and its fields; None where it was not evaluated."""
    metric = entry.judged.get("metric", "")
    fields = entry.domain_scores.get(metric)
    return (metric, fields) if fields else None


def kept(entry: AdapterEntry) -> Mapping[str, Any] | None:
    """General knowledge, all probes pooled; None where none was asked."""
    return entry.general.get("pooled")


def open_gates(entry: AdapterEntry) -> list[Mapping[str, Any]]:
    """The gates that keep an adapter from shipping, failed ones first."""
    gates = [gate for gate in entry.gates if gate["verdict"] in WORST_FIRST[:2]]
    return sorted(gates, key=lambda gate: WORST_FIRST.index(gate["verdict"]))


# ── What else was found out about one adapter ───────────────────────────────────────────────────


def looked(looks: Fields) -> str:
    """Where the verdict stands among all looks at its test rows (``looks.Standing``)."""
    before = _plural(looks["before"], "look")
    others = _plural(looks["adapters"], "other adapter")
    said = f"{before} before this one, {others} judged first: gates hold {level(looks)} bounds"
    return f"{said}; {looks['broken']}" if looks["broken"] else said


def level(looks: Fields) -> str:
    return f"{100 * looks['level']:.6g} %"


def between(fields: Mapping[str, Any], key: str, bounds: Mapping[str, Any]) -> str:
    """``0.021 (0.010 to 0.034)``: a figure that is no difference, and its bounds."""
    return f"{number(fields[key])} ({number(bounds['lower'])} to {number(bounds['upper'])})"


def calibrated(found: Fields) -> str:
    """How far a confidence can be believed (``calibration.calibration``)."""
    ece, brier = (between(found, key, found["bounds"][key]) for key in ("ece", "brier"))
    return f"expected error {ece}, Brier score {brier}; 0 is best"


def remembered(found: Fields) -> str:
    """What the adapter gained tells training rows from test rows (``memorisation``)."""
    auc = between(found, "auc", found)
    rows = f"{found['train']} training and {found['test']} test rows"
    return f"its gain tells training rows from test rows with an AUC of {auc}; .5 is chance; {rows}"


def named_from(curve: Fields) -> str:
    """From which probability the positive class is named, and who chose that."""
    if "targets" not in curve:
        return f"{curve['positive']} is named where it is the likeliest class"
    target = ", ".join(f"{name} {value:g}" for name, value in curve["targets"].items())
    if curve["threshold"] is None:
        return f"no threshold reached {target} on validation rows: the likeliest class is named"
    return (
        f"{curve['positive']} is named from a probability of {number(curve['threshold'])} on, "
        f"which validation rows chose for {target}"
    )


# ── All of them ─────────────────────────────────────────────────────────────────────────────────


def ranked(report: Report) -> list[AdapterEntry]:
    """The adapters, those that fail first, else in the order they were given."""
    return sorted(report.adapters, key=lambda entry: WORST_FIRST.index(entry.outcome))


def outcome(report: Report) -> str:
    """The worst verdict; ``fail`` too when something got worse since the older report."""
    if report.since and report.since["worse"]:
        return "fail"
    found = {entry.outcome for entry in report.adapters}
    return next(verdict for verdict in WORST_FIRST if verdict in found)


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
    return f"{_plural(len(verdicts), 'adapter')}: {', '.join(parts)}."


def brief(entry: AdapterEntry) -> str:
    """What keeps an adapter from shipping, in a line: ``fails recall (0.120 against 0.8)``."""
    if not entry.gates:
        return "has not been evaluated"
    phrases = []
    for verdict, words in (("fail", "fails"), ("inconclusive", "is undecided on")):
        found = [
            f"{g['name']} ({number(g['observed'])} against {g['threshold']:.3g})"
            for g in entry.gates
            if g["verdict"] == verdict
        ]
        phrases += [f"{words} {', '.join(found)}"] if found else []
    return "; ".join(phrases)


def best_baseline(metric: str, fields: Mapping[str, Any]) -> tuple[str, float] | None:
    """The strongest cheap contender on ``metric`` and its value; None where there is none."""
    sign = metric_named(metric).sign
    found = {name: v for name, v in fields["baselines"].items() if v is not None}
    return max(found.items(), key=lambda pair: sign * pair[1]) if found else None


def reasons(entry: AdapterEntry) -> list[str]:
    """Why an adapter does not ship: one sentence for each gate that did not pass."""
    if not entry.gates:
        return ["It has not been evaluated: there is no verdict."]
    return [f"{gate['name']}: {gate['why']}" for gate in open_gates(entry)]


def fallen(since: Mapping[str, Any]) -> list[str]:
    """What got worse since the older report, a sentence each; then flips that prove nothing."""
    worse: list[str] = []
    open_: list[str] = []
    for name, found in since["adapters"].items():
        for figure, fields in found["figures"].items():
            if fields["worse"]:
                what = "on the same rows" if fields["paired"] else "over the base, on other rows,"
                sign = "" if fields["paired"] else "+"
                worse.append(
                    f"{name}: {metric_name(figure)} {what} went from {fields['before']:{sign}.3f} "
                    f"to {fields['now']:{sign}.3f}, with 95 % confidence by at least "
                    f"{_nearest(fields):.3f}."
                )
        for gate in found["gates"]:
            sentence = f"{name}: {gate['name']} was {gate['before']}, is {gate['now']}."
            (worse if gate["worse"] else open_).append(sentence)
    open_ += [f"{name} was in it and is not in this one." for name in since["missing"]]
    return worse + open_


def _nearest(fields: Mapping[str, Any]) -> float:
    """The bound of a worse change that lies nearest to no change, as a size."""
    return float(min(abs(fields["lower"]), abs(fields["upper"])))


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def losses(entry: AdapterEntry) -> str:
    """What the loss is on test rows, and in the table of epochs."""
    head = entry.task.get("head")
    trained = "label cross-entropy" if head else "nats per answer token"
    judged = entry.judged.get("loss") or trained
    if judged == trained:
        return f"Loss is {judged}, here and in the epochs."
    return f"Loss is {judged}; in the epochs it is {trained}, as it is trained."


def nats_of(entry: AdapterEntry) -> str:
    """What nats on general text are counted by."""
    masked = entry.judged.get("knowledge") == "masked tokens"
    return "nats per masked token" if masked else "nats per token"
