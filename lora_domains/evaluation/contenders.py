"""Base, adapters and baselines on the same rows, as items; see ``scorer`` for how they are scored.

``evaluate`` scores one adapter, ``benchmark`` many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.dataset import Dataset
from lora_domains.domain import JUDGE, Domain
from lora_domains.evaluation.baselines import baseline_scores
from lora_domains.evaluation.items import (
    Items,
    groups_of,
    make_items,
    question_items,
    text_items,
)
from lora_domains.evaluation.scorer import Part, Scorer, reference_of
from lora_domains.inference.generation import decoding
from lora_domains.inference.likelihoods import start_of_text
from lora_domains.inference.scores import (
    TEXT,
    Scores,
    Thresholds,
    add_won,
    best_threshold,
    decided,
    model_scores,
    without_text,
)
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import WINDOW, row_limit, tokenization_of
from lora_domains.modeling.heads import own_layout
from lora_domains.probes.features import feature_sets, probed
from lora_domains.probes.own_text import drift_rows
from lora_domains.probes.suite import Probe, Suite
from lora_domains.stats.thresholds import LEVEL, Chosen
from lora_domains.tasks import Example, LanguageModelling, Task
from lora_domains.tokenization.encoded import EncodedRow
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import finite

TRAIN_SAMPLE = 500
"""The most training rows that are scored for the overfit gate."""


# ── The rows of a domain ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DomainScores:
    """An adapter's items on the rows of its domain."""

    items: Items
    threshold: dict[str, Any] | None
    """The target of the positive class and the adapter's threshold for it; None without one."""


def score_domain(
    scorer: Scorer, dataset: Dataset, adapters: Sequence[str], key: bytes, *,
    parent: str | None = None, others: Sequence[str] = (),
) -> dict[str, DomainScores]:  # fmt: skip
    """The items of each of ``adapters``, which are all of the dataset's domain.

    ``parent`` is the loaded adapter that training continued from, one more contender. ``others``
    are adapters of any domain; each test item holds their scores under ``others``.
    """
    _check_judge(scorer, dataset)
    task, name = dataset.domain.task, dataset.domain.name
    rows, train_rows = scored_rows(dataset), training_sample(dataset)
    tuning = rows[: len(rows) - len(dataset.test)]
    baselines, fitted = baseline_scores(scorer, dataset, rows, train_rows)
    # Where a baseline is called "base", the base has no scores of its own (see ``BASELINES``).
    base = [] if "base" in baselines else [None]
    loaded = [n for n in scorer.bank if n in {*adapters, *others, parent}]
    scores = scorer.scores(Part(f"{name} rows", task, rows), [*base, *loaded])
    seen = Part(f"{name} training rows", seen_by(dataset.domain), train_rows)
    train = scorer.scores(seen, adapters)
    likelihoods = Part(f"{name} training rows by the base", likelihood_only(task), train_rows)
    train |= scorer.scores(likelihoods, base)
    for records in baselines.values() if None in scores else ():
        add_won(records, scores[None])
    add_judged(scorer, dataset, rows, [*scores.values(), *baselines.values()])
    # Each contender has a threshold of its own, so that none is at an advantage.
    choose = partial(_chosen, task, tuning=tuning)
    chosen = {who: choose(records) for who, records in scores.items()}
    scores = {who: decided(task, records, chosen[who]) for who, records in scores.items()}
    train = {who: decided(task, records, chosen[who]) for who, records in train.items()}
    limits = {who: choose(records) for who, records in baselines.items()}
    baselines, fitted = (
        {who: decided(task, records, limits[who]) for who, records in part.items()}
        for part in (baselines, fitted)
    )
    by_adapter = {}
    for adapter in adapters:
        contenders = {"base": scores.get(None, []), "adapter": scores[adapter]}
        contenders |= ({"parent": scores[parent]} if parent else {}) | baselines
        crossed = {other: scores[other] for other in others if other != adapter}
        on_train = {who: train[route] for who, route in (("base", None), ("adapter", adapter))
                    if route in train} | fitted  # fmt: skip
        items = _test_items(dataset, rows, contenders, crossed if others else None, key)
        items += make_items("train", train_rows, on_train, key, dataset.domain.show_text)
        threshold = _threshold_record(task, chosen[adapter], tuning, scorer.display)
        by_adapter[adapter] = DomainScores(items, threshold)
    return by_adapter


def score_validation(
    scorer: Scorer, dataset: Dataset, adapters: Sequence[str]
) -> dict[str, dict[str, Scores]]:
    """For each of ``adapters``, which are of the dataset's domain: base, adapter and baselines on
    the validation rows, by contender."""
    _check_judge(scorer, dataset)
    task, rows = dataset.domain.task, dataset.validation
    others, _ = baseline_scores(scorer, dataset, rows)
    base = [] if "base" in others else [None]
    scores = scorer.scores(Part(f"{dataset.domain.name} rows", task, rows), [*base, *adapters])
    others |= {"base": scores[None]} if base else {}
    every = [*others.values(), *(scores[name] for name in adapters)]
    for records in every:  # of which a baseline is compared with itself
        add_won(records, others["base"])
    add_judged(scorer, dataset, rows, every)
    others = {who: decided(task, one, _chosen(task, one, rows)) for who, one in others.items()}
    own = {name: decided(task, one := scores[name], _chosen(task, one, rows)) for name in adapters}
    return {name: others | {"adapter": found} for name, found in own.items()}


def score_alone(scorer: Scorer, dataset: Dataset, adapter: str) -> Scores:
    """One adapter on the validation rows, without base and baselines."""
    task, rows = dataset.domain.task, dataset.validation
    scores = scorer.scores(Part(f"{dataset.domain.name} rows", task, rows), [adapter])[adapter]
    add_judged(scorer, dataset, rows, [scores])
    return decided(task, scores, _chosen(task, scores, rows))


def _check_judge(scorer: Scorer, dataset: Dataset) -> None:
    """Raise an error for a judge that does not work, before anything is scored."""
    if scorer.judges:
        distributed.on_main(dataset.domain.check_judge)


def add_judged(
    scorer: Scorer, dataset: Dataset, rows: Sequence[EncodedRow], contenders: Sequence[Scores]
) -> None:
    """Add the scores of the domain's judge, if it has one, to the records of ``contenders``.

    All answers are judged in one call, which the main process makes.
    """
    judge = dataset.domain.judge
    if judge is None or not scorer.judges:
        return
    tokenizer = scorer.bank.base.tokenizer
    answered = [
        (record, (row.example.prompt, reference_of(row, tokenizer), record[TEXT]))
        for records in contenders for row, record in zip(rows, records, strict=True)
        if TEXT in record
    ]  # fmt: skip
    with scorer.display.progress("judging answers", len(answered)):
        scores = distributed.on_main(lambda: judge.scores([asked for _, asked in answered]))
    for (record, _), score in zip(answered, scores, strict=True):
        record[JUDGE] = score


def _test_items(
    dataset: Dataset, rows: Sequence[EncodedRow], contenders: Mapping[str, Scores],
    others: Mapping[str, Scores] | None, key: bytes,
) -> Items:  # fmt: skip
    """Items of the validation rows that chose a threshold, and of the test rows after them."""
    cut = len(rows) - len(dataset.test)
    items: Items = []
    for split, places in (("validation", slice(cut)), ("test", slice(cut, None))):
        part = {who: scores[places] for who, scores in contenders.items()}
        items += make_items(split, rows[places], part, key, dataset.domain.show_text)
    if others is not None:
        for at, item in enumerate(items[cut:], cut):
            item["others"] = {who: without_text(scores[at]) for who, scores in others.items()}
    return items


def scored_rows(dataset: Dataset) -> list[EncodedRow]:
    """The test rows, after the validation rows where these choose a threshold.

    No gate reads the validation rows.
    """
    return [*(dataset.validation if dataset.domain.task.tuned else ()), *dataset.test]


def training_sample(dataset: Dataset) -> list[EncodedRow]:
    """``TRAIN_SAMPLE`` training examples at most, drawn by the domain's seed, in order."""
    examples, seed = dataset.prepared.train, dataset.domain.training.seed
    picks = np.random.default_rng([seed, TRAIN_SAMPLE]).permutation(len(examples))[:TRAIN_SAMPLE]
    ids = {examples[i].id for i in picks}
    return [row for row in dataset.train if row.example.id in ids]


def likelihood_only(task: Task) -> Task:
    """``task``, or one that scores the likelihood alone where ``task`` generates answers."""
    return LanguageModelling() if task.scored_by == "text" else task


def seen_by(domain: Domain) -> Task:
    """The task that scores training rows: no answer is generated that the metric does not read."""
    read = set(metric_named(domain.primary_metric).scores)
    return likelihood_only(domain.task) if read <= {"nats", "tokens"} else domain.task


def _chosen(task: Task, scores: Scores, tuning: Sequence[EncodedRow]) -> Thresholds:
    """``best_threshold`` of a contender by the rows that choose it."""
    return best_threshold(task, scores, [row.encoded for row in tuning], groups_of(tuning))


def _threshold_record(
    task: Task, chosen: Thresholds, tuning: Sequence[EncodedRow], display: Display
) -> dict[str, Any] | None:
    """What a card keeps of the adapter's threshold; warns where the target is not reached."""
    if not task.tuned:
        return None
    if task.outputs == "labels":
        if chosen is None:
            display.warn(
                f"no thresholds are chosen: none of the {len(tuning)} validation rows has a label, "
                "or a probability is not a number. Labels are predicted from 0.5."
            )
        values = () if chosen is None else map(float, chosen)
        by_label = dict(zip(task.labels or (), values, strict=False))
        return {"targets": {}, "threshold": None, "by_label": by_label}
    ((name, target),) = task.targets.items()
    positives = sum(encoded.target == task.positive_index for _, encoded in tuning)
    if not isinstance(chosen, Chosen):
        why = f"its probability on some of the {len(tuning)} validation rows is not a number"
        if not positives:
            why = f"none of the {len(tuning)} validation rows is {task.positive}"
        display.warn(f"no threshold is chosen: {why}. The most likely class is predicted.")
        return {"targets": task.targets, "threshold": None}
    if chosen.lower < target:
        display.warn(
            f"no threshold is shown to reach {name} {target:g}: the best has at least "
            f"{chosen.lower:.3f} with {100 * LEVEL:g} % confidence on {len(tuning)} validation "
            f"rows, {positives} of them {task.positive}. Give more of them (--validation)."
        )
    return {"targets": task.targets, **chosen._asdict(), "level": LEVEL}


# ── General knowledge ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GeneralScores:
    """An adapter's items on general questions and texts."""

    items: Items
    largest_move: float
    """The largest absolute difference of a logit between adapter and base on the texts, or of a
    feature; 0 without texts."""


def score_general(
    scorer: Scorer, suite: Suite, max_length: int, adapters: Sequence[str], key: bytes
) -> dict[str, GeneralScores]:
    """The items of each of ``adapters`` on ``suite``, its prompts of ``max_length`` tokens at most.

    Questions are for causal bases; texts need a language head (masked tokens of an encoder). An
    encoder without one has ``feature_sets`` in place of both.
    """
    base = scorer.bank.base
    tokenization = Tokenization(
        base.tokenizer, max_length, bidirectional=base.bidirectional,
        window=min(max_length, WINDOW), start=start_of_text(base),
    )  # fmt: skip
    if not base.bidirectional and suite.probes:
        scorer.display.stage("general", None, None, f"questions: {suite.describe()}")
    items: dict[str, Items] = {name: [] for name in adapters}
    largest = dict.fromkeys(adapters, 0.0)
    for probe, questions in suite.by_probe() if not base.bidirectional else ():
        if not questions:
            continue
        part = probe_part(probe, [example for _, example in questions], base, tokenization)
        rows, scores = part.rows, scorer.scores(part, [None, *adapters])
        parts = [part for part, _ in questions]
        for name in adapters:
            pair = {"base": scores[None], "adapter": scores[name]}
            items[name] += question_items(rows, parts, pair, key)
    if general_knowledge(base) == "features":
        for name, own in feature_scores(scorer, max_length, adapters, key).items():
            items[name] += own.items
            largest[name] = own.largest_move
    texts = drift_rows(base, suite, tokenization, scorer.display, in_part=scorer.in_part)
    if texts:
        moved = scorer.drift(Part("general text", LanguageModelling(), texts), adapters)
        for name, fields in moved.items():
            items[name] += text_items(texts, fields, suite.name, key)
            # NumPy's maximum is NaN where any move is; Python's would lose it.
            largest[name] = float(np.max([field["largest"] for field in fields]))
    return {name: GeneralScores(items[name], largest[name]) for name in adapters}


def probe_part(
    probe: Probe, questions: Sequence[Example], base: Base, tokenization: Tokenization
) -> Part:
    """``questions`` of a probe as they are asked on ``base``: encoded by ``tokenization``, or in
    the base's own form, where an instruction is not truncated to the rows of the domain."""
    task = probe.task
    if probe.own_form:
        task = task.with_chat(base.chats)
        tokenization = tokenization_of(base, task, row_limit(base, None))
    rows = [EncodedRow(example, tokenization.encode(example)) for example in questions]
    return Part(f"{probe.name} questions", task, rows, probe.score or model_scores, read=False)


def general_knowledge(base: Base) -> str:
    """How general knowledge is measured: "questions", "masked tokens" or "features".

    In this order, of a causal base, an encoder, and an encoder without a masked-token head.
    """
    if not base.bidirectional:
        return "questions"
    return "masked tokens" if base.language_head else "features"


def feature_scores(
    scorer: Scorer, max_length: int, adapters: Sequence[str], key: bytes
) -> dict[str, GeneralScores]:
    """The items of each of ``adapters`` on ``feature_sets``: what linear probes of its features,
    and of the base's, predict."""
    base, items = scorer.bank.base, {name: Items() for name in adapters}
    tokenization = Tokenization(base.tokenizer, max_length, head=True, bidirectional=True)
    pooling, sets = own_layout(base).pooling, feature_sets()
    rows = [tokenization.encode_rows(one.examples()) for one in sets]
    every, ends = [row for part in rows for row in part], np.cumsum([len(part) for part in rows])
    features: dict[str | None, np.ndarray] = {}
    predicted: dict[str | None, list[list[int]]] = {}
    for route in (None, *adapters):
        with scorer.bank.routed(route):
            features[route] = scorer.features(every, pooling).numpy()
        parts = np.split(features[route], ends[:-1])
        predicted[route] = distributed.on_main(partial(probed, parts))
    for n, (one, part) in enumerate(zip(sets, rows, strict=True)):
        scores: dict[str | None, Scores] = {
            route: [{"prediction": label} for label in labels[n]]
            for route, labels in predicted.items()
        }
        for name in adapters:
            pair = {"base": scores[None], "adapter": scores[name]}
            items[name] += question_items(part, [f"features/{one.name}"] * len(part), pair, key)
    moves = {name: float(np.abs(features[name] - features[None]).max()) for name in adapters}
    return {name: GeneralScores(items[name], moves[name]) for name in adapters}


# ── Everything ──────────────────────────────────────────────────────────────────────────────────


def score_adapter(
    scorer: Scorer, dataset: Dataset, suite: Suite, name: str, key: bytes, parent: str | None
) -> tuple[Items, dict[str, Any]]:
    """The items of the adapter ``name``, and ``judged`` of its card but for ``base_changed``."""
    with distributed.sharing():
        own = score_domain(scorer, dataset, [name], key, parent=parent)[name]
        # All adapters are asked the same questions, whatever the length of the domain's rows.
        length = row_limit(scorer.bank.base, None)
        general = score_general(scorer, suite, length, [name], key)[name]
        largest_move = general.largest_move
        if not largest_move:  # no text was scored
            largest_move = scorer.largest_move(scored_rows(dataset), name)
    return own.items + general.items, {
        **rules(dataset.domain, scorer.bank.base),
        "largest_move": finite(largest_move),
        "suite": suite.name,
        "threshold": own.threshold,
    }


def rules(domain: Domain, base: Base) -> dict[str, Any]:
    """The part of ``judged`` that says how figures are computed from items."""
    task = domain.task
    rules: dict[str, Any] = {
        "metric": domain.primary_metric,
        "labels": list(task.labels or ()),
        "positive": task.positive,
        "loss": task.loss_unit,
        "prevalence": domain.prevalence,
        "knowledge": general_knowledge(base),
        "embedded_base": base.id == "embedded",
    }
    if task.scored_by == "text":
        rules["decoding"] = decoding(base, task)
    if domain.judge is not None:
        rules["judge"] = domain.judge.record()
    return rules
