"""Baselines: predictions for the same rows without an adapter. ``BASELINES`` lists them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import numpy as np

from lora_domains.dataset import Dataset
from lora_domains.errors import ChatTemplateError, DataError
from lora_domains.evaluation.linear import (
    Split,
    nearest,
    predict,
    predict_labels,
    predict_number,
    sparse_logistic_regression,
    sparse_ridge,
    support_vectors,
    tfidf_features,
)
from lora_domains.evaluation.scorer import Part, Scorer, reference_of
from lora_domains.inference.scores import (
    Scores,
    best_threshold,
    class_score,
    decided,
    head_score,
    text_score,
)
from lora_domains.modeling.heads import own_layout
from lora_domains.probes.features import probe, ridge
from lora_domains.tasks import Example, Outputs
from lora_domains.tokenization.chat_template import ChatTemplate
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.tokenization.turns import NO_SHOTS, Shots
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.scores import ScoreTable

SHOTS = 4
"""Examples in the prompt of the few-shot baseline."""


OutputFit = Callable[..., np.ndarray]
"""``linear.predict_labels`` or ``predict_number``."""


@dataclass(frozen=True)
class BaselineInputs:
    """What a baseline is computed from: a dataset, the rows to predict, and the scorer."""

    scorer: Scorer
    dataset: Dataset
    rows: Sequence[EncodedRow]

    @property
    def labels(self) -> int:
        """Number of labels that all rows share; 0 for tasks without such labels."""
        return len(self.dataset.domain.task.labels or ())

    @property
    def outputs(self) -> Outputs:
        """What the task predicts of a row."""
        return self.dataset.domain.task.outputs

    def records(self, log_shares: np.ndarray) -> Scores:
        """Score records from the log-probabilities of the labels, (rows, labels)."""
        return self._records(log_shares, [example.target for example, _ in self.rows])

    def output_records(self, outputs: np.ndarray) -> Scores:
        """Score records from what a head would give, (rows, outputs), of labels and numbers."""
        return self._output_records(outputs, [example.truth for example, _ in self.rows])

    def _output_records(self, outputs: np.ndarray, truth: Sequence[Sequence[float]]) -> Scores:
        task = self.dataset.domain.task
        examples = (EncodedExample("", (), (), truth=tuple(row)) for row in truth)
        return [head_score(task, *pair) for pair in zip(outputs, examples, strict=True)]

    def _records(self, log_shares: np.ndarray, targets: Sequence[int]) -> Scores:
        positive = self.dataset.domain.task.positive_index
        return [class_score(row, target, positive)
                for row, target in zip(log_shares, targets, strict=True)]  # fmt: skip

    def predicted(
        self, classifier: Callable[[float], Any], features: Sequence[Any],
        targets: Sequence[Sequence[int]],
    ) -> Scores:  # fmt: skip
        """The records of a linear classifier, the strength with the best domain metric.

        ``features`` and ``targets`` are those of the training, validation and predicted rows.
        """
        task = self.dataset.domain.task
        metric = metric_named(self.dataset.domain.primary_metric)

        def score(log_shares: np.ndarray, targets: Sequence[int]) -> float:
            table = ScoreTable(
                {"target": target, "scores": {"baseline": record}}
                for target, record in zip(targets, self._records(log_shares, targets), strict=True)
            )
            value = metric.value(table, "baseline", task.positive_index)
            return -math.inf if value is None else metric.sign * value

        train, validation, _ = map(Split, features, targets)
        return self.records(
            predict(classifier, train, validation, features[-1], self.labels, score)
        )

    def predicted_outputs(
        self, fit: OutputFit, model: Callable[[float], Any], features: Sequence[Any],
        splits: Sequence[Sequence[Example]],
    ) -> Scores:  # fmt: skip
        """The records of linear models of labels or numbers, as ``predicted`` has them."""
        task = self.dataset.domain.task
        metric = metric_named(self.dataset.domain.primary_metric)
        mean, sd = task.scale or (0.0, 1.0)

        def score(outputs: np.ndarray, targets: np.ndarray) -> float:
            truth = (mean + sd * targets).tolist()
            records = self._output_records(outputs, truth)
            examples = [EncodedExample("", (), (), truth=tuple(row)) for row in truth]
            chosen = best_threshold(task, records, examples, [None] * len(examples))
            table = ScoreTable(
                {"target": -1, "truth": row, "scores": {"baseline": record}}
                for row, record in zip(truth, decided(task, records, chosen), strict=True)
            )
            value = metric.value(table, "baseline")
            return -math.inf if value is None else metric.sign * value

        targets = [(np.array([one.truth for one in split]) - mean) / sd for split in splits]
        train, validation, _ = map(Split, features, targets)
        return self.output_records(fit(model, train, validation, features[-1], score))


Baseline = Callable[[BaselineInputs], Scores | None]
"""The records of ``BaselineInputs.rows``; None where the baseline does not apply."""


def baseline_scores(
    scorer: Scorer, dataset: Dataset, rows: Sequence[EncodedRow], train: Sequence[EncodedRow] = ()
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """The records of every baseline that applies to ``rows``, by its name.

    None applies without training rows. The second result has those of the ``TRAINED`` ones on
    ``train``, some of their training rows.
    """
    alone = BaselineInputs(scorer, dataset, rows)
    both = BaselineInputs(scorer, dataset, [*rows, *train])
    scores: dict[str, Scores] = {}
    seen: dict[str, Scores] = {}
    for name, baseline in BASELINES.items() if dataset.train else ():
        records = baseline(both if name in TRAINED else alone)
        if records is not None:
            scores[name] = records[: len(rows)]
            if name in TRAINED:
                seen[name] = records[len(rows) :]
    return scores, seen


# ── Without the base ────────────────────────────────────────────────────────────────────────────


def majority(setting: BaselineInputs) -> Scores | None:
    """The most common training label; probabilities are the labels' shares, each count plus one."""
    if not setting.labels or setting.outputs != "classes":
        return None
    counts = np.ones(setting.labels)
    for example in setting.dataset.prepared.train:
        counts[example.target] += 1
    shares = np.log(counts / counts.sum())
    return setting.records(np.tile(shares, (len(setting.rows), 1)))


def frequent_labels(setting: BaselineInputs) -> Scores | None:
    """The same labels for every row: each with its share of the training rows as probability."""
    train = setting.dataset.prepared.train
    if setting.outputs != "labels" or not train:
        return None
    shares = (np.array([example.truth for example in train]).sum(0) + 1) / (len(train) + 2)
    return setting.output_records(np.tile(np.log(shares / (1 - shares)), (len(setting.rows), 1)))


def median(setting: BaselineInputs) -> Scores | None:
    """The median of the training rows' numbers, which has the least absolute error of constants."""
    train = setting.dataset.prepared.train
    if setting.outputs != "value" or not train:
        return None
    mean, sd = setting.dataset.domain.task.scale or (0.0, 1.0)
    middle = float(np.median([example.truth[0] for example in train]))
    return setting.output_records(np.full((len(setting.rows), 1), (middle - mean) / sd))


def tfidf(setting: BaselineInputs) -> Scores | None:
    """TF-IDF of words and characters with a linear support vector machine (``linear``), with a
    logistic regression of each label where rows may have several, or a linear regression."""
    prepared = setting.dataset.prepared
    if not (setting.labels or setting.outputs == "value") or not prepared.train:
        return None
    splits = (prepared.train, prepared.validation, [row.example for row in setting.rows])
    features = tfidf_features(*([example.prompt for example in split] for split in splits))
    if setting.outputs == "labels":
        return setting.predicted_outputs(
            predict_labels, sparse_logistic_regression, features, splits
        )
    if setting.outputs == "value":
        return setting.predicted_outputs(predict_number, sparse_ridge, features, splits)
    targets = [[example.target for example in split] for split in splits]
    return setting.predicted(support_vectors, features, targets)


def nearest_answer(setting: BaselineInputs) -> Scores | None:
    """The answer to the training prompt that resembles a row's most, where answers are generated.

    Retrieval at no cost of a model (TF-IDF of words and characters, ``linear.nearest``).
    """
    task, train = setting.dataset.domain.task, setting.dataset.prepared.train
    if task.scored_by != "text" or not train:
        return None
    prompts = [row.example.prompt for row in setting.rows]
    tokenizer = setting.dataset.tokenization.tokenizer
    return [
        text_score(task, train[at].answer.strip(), reference_of(row, tokenizer))
        for at, row in zip(
            nearest([example.prompt for example in train], prompts), setting.rows, strict=True
        )
    ]


# ── The base with frozen weights ────────────────────────────────────────────────────────────────


def frozen_features(setting: BaselineInputs) -> Scores | None:
    """Logistic regression on the base's frozen features, where the adapter has a head.

    A linear probe (Alain & Bengio 2016) on the rows, prompt and position that the head reads. It
    takes the place of the base, which has no head of its own.
    """
    dataset, bank = setting.dataset, setting.scorer.bank
    if not dataset.tokenization.head:
        return None
    splits = (dataset.train, dataset.validation, setting.rows)
    total = sum(map(len, splits))
    with bank.routed(None), setting.scorer.display.progress("frozen features", total) as advance:
        pooling = own_layout(bank.base).pooling
        features = [setting.scorer.features(rows, pooling, advance).numpy() for rows in splits]
    examples = [[row.example for row in rows] for rows in splits]
    if setting.outputs == "labels":
        return setting.predicted_outputs(predict_labels, probe, features, examples)
    if setting.outputs == "value":
        return setting.predicted_outputs(predict_number, ridge, features, examples)
    targets = [[row.example.target for row in rows] for rows in splits]
    return setting.predicted(probe, features, targets)


def few_shot(setting: BaselineInputs) -> Scores | None:
    """The base with ``SHOTS`` answered training rows in its prompt."""
    dataset = setting.dataset
    prompted = with_shots(dataset, setting.rows, setting.scorer.display.warn)
    if not prompted:
        return None
    name = f"{dataset.domain.name} rows with {SHOTS} examples"
    return setting.scorer.scores(Part(name, dataset.domain.task, prompted), [None])[None]


BASELINES: dict[str, Baseline] = {
    "base": frozen_features,
    "majority": majority,
    "frequent_labels": frequent_labels,
    "median": median,
    "tfidf": tfidf,
    "nearest": nearest_answer,
    f"{SHOTS}_shot": few_shot,
}
"""Every baseline by the name that reports use. ``base`` stands for the base where the base has no
scores of its own, because the adapter has a head."""
TRAINED = ("base", "majority", "frequent_labels", "median", "tfidf")
"""Baselines that are fitted to the training rows, and cost little to score on them."""


# ── Few-shot prompts ────────────────────────────────────────────────────────────────────────────


def with_shots(
    dataset: Dataset, rows: Sequence[EncodedRow], warn: Callable[[str], None]
) -> list[EncodedRow]:
    """``rows`` encoded with answered training rows before them; empty where one has no room.

    All rows or none are encoded, because contenders are compared on the same rows; a warning says
    where examples displace text. None are for plain text, which has no answers to show, and for a
    head, which reads one text.
    """
    tokenization = dataset.tokenization
    applies = rows[0].example.prompt and not tokenization.head
    shots = _shots(dataset, warn) if applies else NO_SHOTS
    if not shots:
        return []
    try:
        prompted = [tokenization.encode_again(row, shots) for row in rows]
    except DataError as error:
        reason = (
            "its chat template renders the answers otherwise after examples"
            if isinstance(error, ChatTemplateError)
            else f"in a context of {tokenization.max_length} tokens some rows leave no room for "
            "the examples"
        )
        warn(f"the base with {SHOTS} examples in its prompt is not measured: {reason}.")
        return []
    pairs = zip(prompted, rows, strict=True)
    cut = sum(
        p.truncated if shots.messages
        else len(p.prompt) - len(shots.ids) < len(row.encoded.prompt) for p, row in pairs
    )  # fmt: skip
    if cut:
        warn(
            f"the base with {SHOTS} examples in its prompt reads a shorter text in {cut} of "
            f"{len(rows)} rows: the examples take room in its {tokenization.max_length} tokens."
        )
    return [EncodedRow(row.example, encoded) for row, encoded in zip(rows, prompted, strict=True)]


def _shots(dataset: Dataset, warn: Callable[[str], None]) -> Shots:
    """``SHOTS`` answered training rows, of as many labels as possible.

    A row whose answer does not fit its share of the context is left out with a warning; a long
    prompt loses its middle.
    """
    tokenization = dataset.tokenization
    short = Tokenization(tokenization.tokenizer, tokenization.max_length // (SHOTS + 2))
    gap = tokenization.tokens("\n\n")
    ids: list[int] = []
    turns: list[Mapping[str, Any]] = []
    left_out = 0
    for row in _examples(dataset.train, dataset.domain.training.seed):
        if tokenization.template is not None:
            answered = _fitting(short, tokenization.template, answered_turns(row.example))
            turns += answered
            left_out += not answered
            continue
        try:
            encoded = short.encode_again(row)
            ids += [*encoded.prompt[len(short.bos) :], *encoded.answer[:-1], *gap]
        except DataError:
            left_out += 1
    if left_out:
        warn(
            f"{left_out} of the {SHOTS} examples for the base's prompt are left out: their answers "
            f"do not fit their share of {tokenization.max_length} tokens."
        )
    return Shots(tuple(ids), tuple(turns))


def answered_turns(example: Example) -> list[Mapping[str, Any]]:
    """The turns of ``example`` with its answer, without the system's and an opening answer."""
    turns = list(example.messages)
    if turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": example.answer.strip()})
    turns = [turn for turn in turns if turn["role"] != "system"]
    return list(dropwhile(lambda turn: turn["role"] == "assistant", turns))


def _fitting(
    short: Tokenization, template: ChatTemplate, turns: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """``turns`` within the length of ``short``: the longest text of others than the assistant loses
    its middle. Empty where that is not enough."""
    turns, most = list(turns), short.max_length
    others = [n for n, turn in enumerate(turns) if turn["role"] != "assistant"]
    longest = max(others, key=lambda n: len(turns[n]["content"]))
    tokens = short.tokens(turns[longest]["content"])
    over = len(template.prompt(turns)) - most
    while over > 0:
        kept = len(tokens) - over
        if kept < 2:
            return []
        tokens = [*tokens[: kept // 2], *tokens[len(tokens) - (kept - kept // 2) :]]
        content = short.tokenizer.decode(tokens)
        turns[longest] = {**turns[longest], "content": content}
        over = len(template.prompt(turns)) - most
    return turns


def _examples(train: Sequence[EncodedRow], seed: int) -> list[EncodedRow]:
    """``SHOTS`` training rows drawn by ``seed``, one of each label in turn."""
    random = np.random.default_rng([seed, SHOTS])
    by_label: dict[int, list[EncodedRow]] = {}
    train = list({row.example.id: row for row in train}.values())  # a chat may have several parts
    for i in random.permutation(len(train)):
        by_label.setdefault(train[i].example.target, []).append(train[i])
    labels = sorted(by_label)
    random.shuffle(labels)
    picked: list[EncodedRow] = []
    while len(picked) < min(SHOTS, len(train)):
        for label in labels:
            if by_label[label] and len(picked) < SHOTS:
                picked.append(by_label[label].pop())
    return picked
