"""Base, adapter and baselines on the same items in the same batches, down to per-item scores.

What comes out is a list of items (see ``figures``) and nothing else: figures, comparisons and
gates are made from them without a model.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_domains.bank import Bank
from lora_domains.data import Prepared
from lora_domains.display import Advance, Display
from lora_domains.encoding import Encoder, Item
from lora_domains.errors import DataError
from lora_domains.leaks import keyed_digest
from lora_domains.metrics import Classification as ClassificationMetric
from lora_domains.routing import routed
from lora_domains.scoring import (
    answer_nats,
    choice_logprobs,
    drift,
    generate_in_chunks,
    renormalise,
)
from lora_domains.suites import Suite
from lora_domains.tasks import Classification, Example, Generation, LanguageModelling, Task
from lora_domains.thresholds import choose

SHOTS = 4
"""Examples in the prompt of the few-shot baseline."""
TRAIN_SAMPLE = 500
"""Training rows scored for the overfit gate, at most."""

Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Scored:
    """Per-item scores of one evaluation, and what concerns the model as a whole."""

    items: list[dict[str, Any]]
    largest_move: float
    """The largest absolute difference of a logit between adapter and base on general text."""
    threshold: dict[str, Any] | None = None
    """What was wanted of the positive class, and the adapter's threshold for it; None without."""


# ── One contender on encoded items ──────────────────────────────────────────────────────────────


def model_scores(
    bank: Bank, task: Task, items: Sequence[Item], references: Sequence[str], route: str | None,
    advance: Advance = lambda _: None,
) -> Scores:  # fmt: skip
    """The scores of base (``route`` None) or an adapter on ``items``."""
    model, pad = bank.base.model, bank.base.tokenizer.pad_token_id
    with routed(route):
        if items and items[0].choices:
            logprobs = choice_logprobs(model, items, pad, advance)
            positive = positive_of(task)
            return [choice_score(lp, i, positive) for lp, i in zip(logprobs, items, strict=True)]
        if isinstance(task, Generation):
            nats, tokens = answer_nats(model, items, pad)
            texts = generate_in_chunks(
                model, bank.base.tokenizer, items, task.max_new_tokens, advance
            )
            return [
                {"nats": float(n), "tokens": int(t), **overlap(text, reference)}
                for n, t, text, reference in zip(nats, tokens, texts, references, strict=True)
            ]
        nats, tokens = answer_nats(model, items, pad, advance)
        return [{"nats": float(n), "tokens": int(t)} for n, t in zip(nats, tokens, strict=True)]


def positive_of(task: Task) -> int | None:
    """The number of the positive class; None where the task names none."""
    if not isinstance(task, Classification) or task.positive is None or task.labels is None:
        return None
    return task.labels.index(task.positive)


def choice_score(logprobs: np.ndarray, item: Item, positive: int | None = None) -> dict[str, float]:
    """Prediction, label cross-entropy, confidence and Brier term of one item's choices."""
    shares = renormalise(logprobs)
    score = _from_shares(shares, item.target, positive)
    if item.target >= 0:
        score["nats"] = float(-logprobs[item.target])
        score["tokens"] = len(item.choices[item.target])
    return score


def _from_shares(shares: np.ndarray, target: int, positive: int | None) -> dict[str, float]:
    probabilities = np.exp(shares)
    score: dict[str, float] = {
        "prediction": int(shares.argmax()),
        "confidence": float(probabilities.max()),
    }
    if target >= 0:
        truth = np.zeros(len(shares))
        truth[target] = 1.0
        score["nll"] = float(-shares[target])
        score["brier"] = float(((probabilities - truth) ** 2).sum())
    if positive is not None:
        others = np.where(np.arange(len(shares)) == positive, -1.0, probabilities)
        score["positive"] = float(probabilities[positive])
        # What is named, and how surely, where the positive class is not; `_decided` takes them out.
        score["other"], score["other_confidence"] = int(others.argmax()), float(others.max())
    return score


def _decided(scores: Scores, threshold: float | None, positive: int | None) -> Scores:
    """``scores`` with the class that the threshold names, and the confidence in it."""
    if positive is None:
        return scores
    found = []
    for score in scores:
        kept = {k: v for k, v in score.items() if k not in ("other", "other_confidence")}
        if threshold is not None:
            kept |= {"prediction": score["other"], "confidence": score["other_confidence"]}
            if score["positive"] >= threshold:
                kept |= {"prediction": positive, "confidence": score["positive"]}
        found.append(kept)
    return found


def overlap(text: str, reference: str) -> dict[str, float]:
    """Exact match and token F1 of a generated answer (Rajpurkar et al. 2016, SQuAD)."""
    said, wanted = (part.casefold().split() for part in (text, reference))
    common = sum((Counter(said) & Counter(wanted)).values())
    f1 = 2 * common / (len(said) + len(wanted)) if said or wanted else 1.0
    return {"f1": f1, "exact": float(said == wanted)}


# ── The cheap contenders ────────────────────────────────────────────────────────────────────────


def majority_scores(
    train: Sequence[Example], test: Sequence[Example], classes: int, positive: int | None = None
) -> Scores:
    """Always the commonest training label, with the labels' shares (plus one) as probabilities."""
    counts = np.ones(classes)
    for example in train:
        counts[example.target] += 1
    shares = np.log(counts / counts.sum())
    return [_from_shares(shares, example.target, positive) for example in test]


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
    # A label without a training row has no column; it gets a probability near none.
    shares = np.full((len(test), classes), 1e-9)
    shares[:, model.classes_] = np.clip(known, 1e-9, 1.0)
    return [_from_shares(np.log(s), e.target, positive) for s, e in zip(shares, test, strict=True)]


def shots(encoder: Encoder, train: Sequence[Example], seed: int) -> list[int]:
    """Token ids of ``SHOTS`` answered training examples, over as many labels as there is room.

    One whose answer is too long for its share of the context is left out.
    """
    random = np.random.default_rng([seed, SHOTS])
    by_label: dict[int, list[Example]] = {}
    for i in random.permutation(len(train)):
        by_label.setdefault(train[i].target, []).append(train[i])
    labels = sorted(by_label)
    random.shuffle(labels)
    picked: list[Example] = []
    while len(picked) < min(SHOTS, len(train)):
        for label in labels:
            if by_label[label] and len(picked) < SHOTS:
                picked.append(by_label[label].pop())
    short = Encoder(encoder.tokenizer, encoder.max_length // (SHOTS + 2))
    gap = encoder.tokens("\n\n")
    ids: list[int] = []
    for example in picked:
        with suppress(DataError):
            item = short.encode(example)
            ids += [*item.prompt[len(short.bos) :], *item.answer[:-1], *gap]
    return ids


def with_shots(encoder: Encoder, rows: Sequence[Example], few: Sequence[int]) -> list[Item]:
    """The rows with the examples ``few`` before them; none where one has no room for them.

    All or none, since contenders are compared on the same items.
    """
    try:
        return [encoder.encode(example, few) for example in rows] if few else []
    except DataError:
        return []


# ── All of them ─────────────────────────────────────────────────────────────────────────────────


def score_items(
    bank: Bank,
    adapter: str,
    prepared: Prepared,
    encoder: Encoder,
    suite: Suite,
    key: bytes,
    seed: int,
    display: Display,
    show_text: bool = False,
) -> Scored:
    """Every contender on the test rows, the adapter on training rows, both on the probes."""
    task, positive = prepared.task, positive_of(prepared.task)
    wanted = task.wanted if isinstance(task, Classification) else {}
    # Rows that choose a threshold are scored beside the test rows, and never judged.
    choosing = prepared.validation if wanted else ()
    rows = [*choosing, *prepared.test]
    pairs = _encode(encoder, rows)
    contenders: dict[str, Scores] = {}
    encoded = [item for _, item in pairs]
    references = [example.answer.strip() for example, _ in pairs]
    few = shots(encoder, prepared.train, seed) if prepared.test[0].prompt else []
    for name, route in (("base", None), ("adapter", adapter)):
        with display.progress(f"{name} on test rows", len(pairs)) as advance:
            contenders[name] = model_scores(bank, task, encoded, references, route, advance)
    if isinstance(task, Classification):
        classes = len(task.labels or ())
        contenders["majority"] = majority_scores(prepared.train, rows, classes, positive)
        contenders["tfidf"] = tfidf_scores(prepared.train, rows, classes, positive)
    prompted = with_shots(encoder, [example for example, _ in pairs], few)
    if prompted:
        with display.progress(f"base with {SHOTS} examples", len(pairs)) as advance:
            contenders[f"{SHOTS}_shot"] = model_scores(
                bank, task, prompted, references, None, advance
            )
    train_rows = _encode(encoder, _sample(prepared.train, TRAIN_SAMPLE, seed))
    seen: dict[str, Scores] = {}
    # The base answers no training row: what the adapter gained on them is a matter of nats.
    for name, route, asked in (("base", None, nats_only(task)), ("adapter", adapter, task)):
        with display.progress(f"{name} on training rows", len(train_rows)) as advance:
            answers = [example.answer.strip() for example, _ in train_rows]
            seen[name] = model_scores(
                bank, asked, [i for _, i in train_rows], answers, route, advance
            )
    cut = len(choosing)
    thresholds = {n: _threshold(task, s[:cut], pairs[:cut]) for n, s in contenders.items()}
    contenders = {n: _decided(s, thresholds[n], positive) for n, s in contenders.items()}
    seen = {n: _decided(s, thresholds[n], positive) for n, s in seen.items()}
    if wanted and thresholds["adapter"] is None:
        display.warn(
            f"no threshold reaches the wanted {wanted} on the {cut} validation rows: "
            "the likeliest class is named."
        )
    items = _records(
        "validation", pairs[:cut], {n: s[:cut] for n, s in contenders.items()}, key, show_text
    )
    items += _records("test", pairs[cut:], {n: s[cut:] for n, s in contenders.items()}, key,
                      show_text)  # fmt: skip
    items += _records("train", train_rows, seen, key, show_text)
    items += _probe(bank, adapter, encoder, suite, key, display)
    text, largest = _general_text(bank, adapter, encoder, suite, key, display)
    chosen = {"wanted": wanted, "threshold": thresholds["adapter"]} if wanted else None
    return Scored(items + text, largest, chosen)


def _threshold(task: Task, scores: Scores, rows: Sequence[tuple[Example, Item]]) -> float | None:
    """The contender's own threshold for what is wanted: none has an advantage by its threshold."""
    if not isinstance(task, Classification) or not task.wanted:
        return None
    return choose(
        [score["positive"] for score in scores],
        [item.target == positive_of(task) for _, item in rows],
        wanted_recall=task.wanted_recall,
        wanted_precision=task.wanted_precision,
    )


def nats_only(task: Task) -> Task:
    """``task``, or one that is asked for likelihoods alone where it would generate."""
    return LanguageModelling() if isinstance(task, Generation) else task


def _probe(
    bank: Bank, adapter: str, encoder: Encoder, suite: Suite, key: bytes, display: Display
) -> list[dict[str, Any]]:
    parts, examples = zip(*suite.examples(), strict=True)
    questions = _encode(encoder, examples)
    scores: dict[str, Scores] = {}
    for name, route in (("base", None), ("adapter", adapter)):
        with display.progress(f"{name} on general questions", len(questions)) as advance:
            scores[name] = model_scores(
                bank, suite.task, [i for _, i in questions], [], route, advance
            )
    records = _records("general", questions, scores, key, show_text=False)
    return [record | {"suite": part} for record, part in zip(records, parts, strict=True)]


def _general_text(
    bank: Bank, adapter: str, encoder: Encoder, suite: Suite, key: bytes, display: Display
) -> tuple[list[dict[str, Any]], float]:
    texts = _encode(encoder, suite.texts())
    pad = bank.base.tokenizer.pad_token_id
    with display.progress("drift on general text", len(texts)) as advance:
        moved = drift(bank.base.model, [item for _, item in texts], pad, adapter, advance)
    scores: dict[str, Scores] = {"base": [], "adapter": []}
    for i in range(len(texts)):
        tokens = int(moved["tokens"][i])
        scores["base"].append({"nats": float(moved["base"][i]), "tokens": tokens})
        scores["adapter"].append(
            {"nats": float(moved["adapter"][i]), "tokens": tokens, "kl": float(moved["kl"][i])}
        )
    records = _records("text", texts, scores, key, show_text=False)
    return [r | {"suite": suite.name} for r in records], float(moved["largest"].max())


def _encode(encoder: Encoder, examples: Sequence[Example]) -> list[tuple[Example, Item]]:
    """(example, item) pairs; a long plain text gives several."""
    return [(example, item) for example in examples for item in encoder.encode_all([example])]


def _sample(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    picks = np.random.default_rng([seed, most]).permutation(len(examples))[:most]
    return [examples[i] for i in sorted(picks)]


def _records(
    name: str,
    rows: Sequence[tuple[Example, Item]],
    contenders: dict[str, Scores],
    key: bytes,
    show_text: bool,
) -> list[dict[str, Any]]:
    records = []
    for i, (example, item) in enumerate(rows):
        record: dict[str, Any] = {"set": name, "id": item.id, "target": item.target}
        text = example.prompt or example.answer
        record["digest"] = keyed_digest(text, key)
        if example.group is not None:
            # A group is often a person: its name is as private as the row.
            record["group"] = keyed_digest(example.group, key)[:16]
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


def validation_figures(
    task: Task, items: Sequence[Item], logprobs: list[np.ndarray] | None, loss: float
) -> dict[str, Any]:
    """Accuracy and the domain metric of one epoch's validation."""
    if logprobs is None:
        # Generated answers would take long every epoch; the loss ranks epochs of free text.
        return {"accuracy": None, "score": loss, "higher_is_better": False}
    said = [int(lp.argmax()) for lp in logprobs]
    truth = [item.target for item in items]
    if not isinstance(task, Classification):
        right = float(np.mean([s == t for s, t in zip(said, truth, strict=True)]))
        return {"accuracy": right, "score": right, "higher_is_better": True}
    metric = ClassificationMetric(list(task.labels or ()), task.positive)
    found = metric.compute(predictions=said, references=truth)
    assert found is not None
    return {
        "accuracy": float(found["accuracy"]),
        "score": float(found[task.metric]),
        "higher_is_better": True,
    }


def unanswered(examples: Sequence[Example]) -> list[Example]:
    """The examples without their answers, as they come at prediction time."""
    return [replace(example, answer="", target=-1) for example in examples]
