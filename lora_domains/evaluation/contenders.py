"""Base, adapter and baselines on the same items in the same batches, down to per-item scores.

What comes out is a list of items (see ``figures``) and nothing else: figures, comparisons and
gates are made from them without a model.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_domains.console import Display
from lora_domains.data.identity import keyed_digest
from lora_domains.data.prepare import Prepared
from lora_domains.data.tokenization import EncodedExample, EncodedRow, Tokenization
from lora_domains.dataset import Dataset
from lora_domains.evaluation.shots import SHOTS, with_shots
from lora_domains.inference.batches import Progress
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import (
    answer_nats,
    choice_logprobs,
    drift,
    head_scores,
    text_features,
)
from lora_domains.inference.scores import Scores, choice_score, class_score
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import Head
from lora_domains.probes.lm_eval import harness_scores
from lora_domains.probes.suite import Suite
from lora_domains.stats.thresholds import choose_threshold
from lora_domains.tasks import Example, LanguageModelling, Task

PROBE_C = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of regularisation tried for the base's own head on frozen features."""
TRAIN_SAMPLE = 500
"""Training rows scored for the overfit gate, at most."""


@dataclass(frozen=True)
class Scored:
    """Per-item scores of one evaluation, and what concerns the model as a whole."""

    items: list[dict[str, Any]]
    largest_move: float
    """The largest absolute difference of a logit between adapter and base on general text."""
    threshold: dict[str, Any] | None = None
    """The target of the positive class and the adapter's threshold for it; None without one."""


# ── One contender on encoded items ──────────────────────────────────────────────────────────────


def model_scores(
    bank: Bank, task: Task, items: Sequence[EncodedExample], references: Sequence[str],
    routes: str | Sequence[str | None] | None, advance: Progress = lambda _: None,
) -> Scores:  # fmt: skip
    """The scores of base (None) or an adapter on ``items``, or of one named for each item."""
    model, pad = bank.base.model, bank.base.tokenizer.pad_token_id
    if task.scored_by == "requests":
        return harness_scores(bank, task, [item.id for item in items], routes, advance)
    with bank.routed(routes):
        if routes is not None and task.head:
            names = [routes] * len(items) if isinstance(routes, str) else routes
            logprobs = head_scores(
                model, [head_of(bank, name) for name in names], items, pad, advance
            )
            return [class_score(lp, i.target, task.positive_index)
                    for lp, i in zip(logprobs, items, strict=True)]  # fmt: skip
        if task.scored_by == "choices":
            logprobs = choice_logprobs(model, items, pad, advance)
            return [choice_score(task, lp, i) for lp, i in zip(logprobs, items, strict=True)]
        if task.scored_by == "text":
            nats, tokens = answer_nats(model, items, pad)
            texts = generate_in_batches(
                model, bank.base.tokenizer, items, task.max_new_tokens, advance
            )
            return [
                {"nats": float(n), "tokens": int(t), **task.score_text(text, reference)}
                for n, t, text, reference in zip(nats, tokens, texts, references, strict=True)
            ]
        nats, tokens = answer_nats(model, items, pad, advance)
        return [{"nats": float(n), "tokens": int(t)} for n, t in zip(nats, tokens, strict=True)]


def head_of(bank: Bank, name: str | None) -> Head:
    head = None if name is None else bank[name].head
    assert head is not None, "an adapter of a task with a head has one, or is not loaded"
    return head


# ── The cheap contenders ────────────────────────────────────────────────────────────────────────


def majority_scores(
    train: Sequence[Example], test: Sequence[Example], classes: int, positive: int | None = None
) -> Scores:
    """Always the commonest training label, with the labels' shares (plus one) as probabilities."""
    counts = np.ones(classes)
    for example in train:
        counts[example.target] += 1
    shares = np.log(counts / counts.sum())
    return [class_score(shares, example.target, positive) for example in test]


def tfidf_scores(
    train: Sequence[Example], test: Sequence[Example], classes: int, positive: int | None = None
) -> Scores:
    """TF-IDF over words and word pairs, and logistic regression (scikit-learn, C = 10)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    with warnings.catch_warnings():
        # Many classes in few rows: scikit-learn wonders whether they are numbers. They are labels.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit(vectors.fit_transform([e.prompt for e in train]), [e.target for e in train])
    known = model.predict_proba(vectors.transform([e.prompt for e in test]))
    shares = _shares(known, model.classes_, classes)
    return [class_score(s, e.target, positive) for s, e in zip(shares, test, strict=True)]


def frozen_scores(
    bank: Bank, dataset: Dataset, test: Sequence[EncodedExample],
    advance: Progress = lambda _: None,
) -> Scores:  # fmt: skip
    """The base where a head answers: logistic regression on its frozen features (scikit-learn).

    A linear probe (Alain & Bengio 2016): the same rows, prompt and place in the text as the
    adapter's head, without an adapter. Its strength C is the one best on the validation rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model, pad = bank.base.model, bank.base.tokenizer.pad_token_id
    task = dataset.prepared.task
    classes = len(task.labels or ())
    with bank.routed(None):
        train, validation = (
            text_features(model, [row.encoded for row in rows], pad, advance).numpy()
            for rows in (dataset.train, dataset.validation)
        )
        read = text_features(model, test, pad, advance).numpy()
    wanted = np.array([row.example.target for row in dataset.validation])
    best: tuple[float, np.ndarray] | None = None
    for strength in PROBE_C:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of unique classes")
            # Unfinished after 300 iterations, it is judged on validation like the others.
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            probe.fit(train, [row.example.target for row in dataset.train])
        known = probe[-1].classes_
        loss, shares = (_shares(probe.predict_proba(x), known, classes) for x in (validation, read))
        nll = float(-loss[np.arange(len(wanted)), wanted].mean())
        if best is None or nll < best[0]:
            best = nll, shares
    assert best is not None
    positive = task.positive_index
    return [class_score(s, i.target, positive) for s, i in zip(best[1], test, strict=True)]


def _shares(known: np.ndarray, columns: np.ndarray, classes: int) -> np.ndarray:
    """Log-probabilities of every class; one without a training row has a share near none."""
    shares = np.full((len(known), classes), 1e-9)
    shares[:, columns] = np.clip(known, 1e-9, 1.0)
    logs: np.ndarray = np.log(shares)
    return logs


def trivial_scores(prepared: Prepared, rows: Sequence[Example]) -> dict[str, Scores]:
    """The contenders that need no model, on ``rows``; none for tasks without labels."""
    task = prepared.task
    if task.labels is None:
        return {}
    classes, positive = len(task.labels), task.positive_index
    return {
        "majority": majority_scores(prepared.train, rows, classes, positive),
        "tfidf": tfidf_scores(prepared.train, rows, classes, positive),
    }


# ── From which probability the positive class is named ──────────────────────────────────────────


def judged_rows(dataset: Dataset) -> list[EncodedRow]:
    """The test rows; before them the validation rows, where they choose a threshold.

    Those are scored beside the test rows, and never judged.
    """
    chosen = dataset.validation if dataset.prepared.task.targets else ()
    return [*chosen, *dataset.test]


def decided(
    task: Task, contenders: Mapping[str, Scores], seen: Mapping[str, Scores],
    choosing: Sequence[EncodedRow], display: Display,
) -> tuple[dict[str, Scores], dict[str, Scores], dict[str, Any] | None]:  # fmt: skip
    """Scores of all rows and of training rows with the class that each contender's threshold names.

    ``choosing`` are the first rows of ``contenders``. Each contender has its own threshold, so that
    none has an advantage by it. The last is the target and the adapter's; None without a target.
    """
    targets, positive, cut = task.targets, task.positive_index, len(choosing)
    thresholds: dict[str, float | None] = {}
    if targets:
        truth = [item.target == positive for _, item in choosing]
        for name, scores in contenders.items():
            chance = [score["positive"] for score in scores[:cut]]
            thresholds[name] = choose_threshold(chance, truth, **targets)
        if thresholds["adapter"] is None:
            display.warn(
                f"no threshold reaches the target {targets} on the {cut} validation rows: "
                "the most likely class is predicted."
            )
    made, learned = (
        {n: [_named(s, thresholds.get(n), positive) for s in scores] for n, scores in part.items()}
        for part in (contenders, seen)
    )
    chosen = {"targets": targets, "threshold": thresholds["adapter"]} if targets else None
    return made, learned, chosen


def _named(
    score: Mapping[str, float], threshold: float | None, positive: int | None
) -> dict[str, float]:
    """``score`` with the class that the threshold names, and the confidence in it."""
    kept = {k: v for k, v in score.items() if k not in ("other", "other_confidence")}
    if threshold is not None and positive is not None:
        kept |= {"prediction": score["other"], "confidence": score["other_confidence"]}
        if score["positive"] >= threshold:
            kept |= {"prediction": positive, "confidence": score["positive"]}
    return kept


# ── All of them ─────────────────────────────────────────────────────────────────────────────────


def score_items(
    bank: Bank,
    adapter: str,
    dataset: Dataset,
    suite: Suite,
    key: bytes,
    display: Display,
    parent: str | None = None,
) -> Scored:
    """Every contender on the test rows, the adapter on training rows, both on the probes.

    ``parent`` is the resident adapter that this one went on from, another contender.
    """
    prepared, tokenization, task = dataset.prepared, dataset.tokenization, dataset.prepared.task
    seed, show_text = dataset.domain.training.seed, dataset.domain.show_text
    pairs = judged_rows(dataset)
    cut = len(pairs) - len(dataset.test)
    contenders: dict[str, Scores] = {}
    encoded = [item for _, item in pairs]
    references = [example.answer.strip() for example, _ in pairs]
    if tokenization.head:
        rows = len(prepared.train) + len(prepared.validation) + len(pairs)
        with display.progress("a head on the frozen base", rows) as advance:
            contenders["base"] = frozen_scores(bank, dataset, encoded, advance)
    routes = {"base": None, "adapter": adapter} | ({"parent": parent} if parent else {})
    for name, route in routes.items():
        if name not in contenders:
            with display.progress(f"{name} on test rows", len(pairs)) as advance:
                contenders[name] = model_scores(bank, task, encoded, references, route, advance)
    contenders |= trivial_scores(prepared, [example for example, _ in pairs])
    prompted = with_shots(tokenization, dataset.train, pairs, seed, display.warn)
    if prompted:
        with display.progress(f"base with {SHOTS} examples", len(pairs)) as advance:
            contenders[f"{SHOTS}_shot"] = model_scores(
                bank, task, prompted, references, None, advance
            )
    train_rows = training_sample(dataset)
    seen: dict[str, Scores] = {}
    for name, route, question in (("base", None, nats_only(task)), ("adapter", adapter, task)):
        # A base under a head has no nats of its own: nothing it could be compared in.
        if route is None and tokenization.head:
            continue
        with display.progress(f"{name} on training rows", len(train_rows)) as advance:
            answers = [example.answer.strip() for example, _ in train_rows]
            seen[name] = model_scores(
                bank, question, [i for _, i in train_rows], answers, route, advance
            )
    contenders, seen, threshold = decided(task, contenders, seen, pairs[:cut], display)
    choosing, tested = ({n: s[part] for n, s in contenders.items()}
                        for part in (slice(cut), slice(cut, None)))  # fmt: skip
    items = item_records("validation", pairs[:cut], choosing, key, show_text)
    items += item_records("test", pairs[cut:], tested, key, show_text)
    items += item_records("train", train_rows, seen, key, show_text)
    if not bank.base.bidirectional:
        items += _probe(bank, adapter, tokenization, suite, key, display)
    if not bank.base.language_head:
        return Scored(items, largest_feature_move(bank, adapter, encoded), threshold)
    text, largest = _general_text(bank, adapter, tokenization, suite, key, display)
    return Scored(items + text, largest, threshold)


def nats_only(task: Task) -> Task:
    """``task``, or one that is asked for likelihoods alone where it would generate."""
    return LanguageModelling() if task.scored_by == "text" else task


def general_knowledge(base: Base) -> str:
    """How general knowledge is asked: of a causal base, of an encoder, of one without its head."""
    if not base.bidirectional:
        return "questions"
    return "masked tokens" if base.language_head else "nothing"


def largest_feature_move(bank: Bank, adapter: str, items: Sequence[EncodedExample]) -> float:
    """The largest change of a feature by the adapter; for a base that gives no logits."""
    read = []
    for route in (None, adapter):
        with bank.routed(route):
            read.append(text_features(bank.base.model, items, bank.base.tokenizer.pad_token_id))
    return float((read[0] - read[1]).abs().max())


def _probe(
    bank: Bank, adapter: str, tokenization: Tokenization, suite: Suite, key: bytes, display: Display
) -> list[dict[str, Any]]:
    tokenization = Tokenization(
        tokenization.tokenizer, tokenization.max_length
    )  # answers are read as text here
    found: list[dict[str, Any]] = []
    for probe in suite.probes:
        asked = [(part, example) for p, part, example in suite.asked() if p is probe]
        if not asked:
            continue
        rows = [EncodedRow(example, tokenization.encode(example)) for _, example in asked]
        references = [example.answer.strip() for example, _ in rows]
        scores: dict[str, Scores] = {}
        for name, route in (("base", None), ("adapter", adapter)):
            with display.progress(f"{name} on {probe.name} questions", len(rows)) as advance:
                scores[name] = model_scores(
                    bank, probe.task, [i for _, i in rows], references, route, advance
                )
        found += general_records(rows, [part for part, _ in asked], scores, key)
    return found


def general_records(
    rows: Sequence[EncodedRow],
    parts: Sequence[str],
    scores: dict[str, Scores],
    key: bytes,
) -> list[dict[str, Any]]:  # fmt: skip
    """Items of one probe. A generated answer counts like a choice: 1 is the right one."""
    scores = {name: [right_or_wrong(score) for score in found] for name, found in scores.items()}
    made = item_records("general", rows, scores, key, show_text=False)
    for record, part in zip(made, parts, strict=True):
        record["target"] = 1 if record["target"] < 0 else record["target"]
        record["suite"] = part
    return made


def right_or_wrong(score: dict[str, float]) -> dict[str, float]:
    """The score of a generated answer as that of a choice: prediction 1 is the right answer."""
    return score if "prediction" in score else score | {"prediction": int(score["exact"])}


def _general_text(
    bank: Bank, adapter: str, tokenization: Tokenization, suite: Suite, key: bytes, display: Display
) -> tuple[list[dict[str, Any]], float]:
    texts = tokenization.encode_rows(suite.texts())
    pad = bank.base.tokenizer.pad_token_id
    with display.progress("drift on general text", len(texts)) as advance:
        items = [item for _, item in texts]
        moved = drift(bank, items, pad, [adapter], advance)[adapter]
    scores: dict[str, Scores] = {"base": [], "adapter": []}
    for at in range(len(texts)):
        for name, score in text_scores({k: float(v[at]) for k, v in moved.items()}).items():
            scores[name].append(score)
    made = item_records("text", texts, scores, key, show_text=False)
    largest = float(moved["largest"].max()) if texts else 0.0
    return [r | {"suite": suite.name} for r in made], largest


def text_scores(moved: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The scores of base and adapter on one general text, from its line of ``drift``."""
    tokens = int(moved["tokens"])
    return {
        "base": {"nats": moved["base"], "tokens": tokens},
        "adapter": {"nats": moved["adapter"], "tokens": tokens, "kl": moved["kl"]},
    }


def training_sample(dataset: Dataset) -> list[EncodedRow]:
    """``TRAIN_SAMPLE`` training examples at most, drawn by the domain's seed, in order."""
    examples, seed = dataset.prepared.train, dataset.domain.training.seed
    picks = np.random.default_rng([seed, TRAIN_SAMPLE]).permutation(len(examples))[:TRAIN_SAMPLE]
    ids = {examples[i].id for i in picks}
    return [row for row in dataset.train if row.example.id in ids]


def groups_of(rows: Sequence[EncodedRow]) -> list[str | None]:
    """The group of each row; the windows of a long text are no more independent than a person's."""
    windows = Counter(example.id for example, _ in rows)
    return [e.group or (e.id if windows[e.id] > 1 else None) for e, _ in rows]


def item_records(
    name: str,
    rows: Sequence[EncodedRow],
    contenders: dict[str, Scores],
    key: bytes,
    show_text: bool,
) -> list[dict[str, Any]]:
    records = []
    for i, ((example, item), group) in enumerate(zip(rows, groups_of(rows), strict=True)):
        record: dict[str, Any] = {"set": name, "id": item.id, "target": item.target}
        text = example.prompt or example.answer
        record["digest"] = keyed_digest(text, key)
        if group is not None:
            # A group is often a person: its name is as private as the row.
            record["group"] = keyed_digest(group, key)[:16]
        if example.slices:
            record["slices"] = dict(example.slices)
        if show_text:
            record["text"] = text
        record["scores"] = {
            contender: {k: round(v, 6) if isinstance(v, float) else v for k, v in s[i].items()}
            for contender, s in contenders.items()
        }
        records.append(record)
    return records
