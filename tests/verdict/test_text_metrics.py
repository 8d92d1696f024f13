"""Metrics of generated answers, computed from stored scores alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from lora_domains.stats.comparisons import compare_accuracy
from lora_domains.tasks.answers import BLEU_COUNTS, answer_scores
from lora_domains.verdict.metrics import METRICS, bleu
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import every_metric

WORDS = ["red", "stone", "by", "the", "blue", "river", "now", ".", ","]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
TRIPLES = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6)


def scored(triples: list[tuple[str, str, str]]) -> ScoreTable:
    """Items of (base, adapter, reference), with the scores that an evaluation stores."""
    return ScoreTable(
        {
            "set": "test", "id": f"test:{n}", "target": -1,
            "scores": {
                "base": answer_scores(base, reference),
                "adapter": answer_scores(adapter, reference),
            },
        }
        for n, (base, adapter, reference) in enumerate(triples)
    )  # fmt: skip


def oracle(answers: list[str], references: list[str]) -> float:
    """sacrebleu's BLEU of a corpus, as a share."""
    return float(BLEU().corpus_score(answers, [references]).score) / 100


# ── BLEU ────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(TRIPLES)
def test_bleu_from_stored_counts_is_that_of_sacrebleu(triples: list[tuple[str, str, str]]) -> None:
    base, adapter, references = map(list, zip(*triples, strict=True))
    table, metric = scored(triples), METRICS["bleu"]
    if max(item["scores"]["base"]["reference_words"] for item in table) < 4:
        assert metric.compare(table) is None
        return
    assert metric.value(table, "base") == pytest.approx(oracle(base, references))
    comparison = metric.compare(table)
    assert comparison is not None
    assert comparison.adapter == pytest.approx(oracle(adapter, references))
    assert (comparison.won, comparison.lost, comparison.p) == (None, None, None)
    bounds = metric.bounds(table, "adapter")
    assert bounds.lower <= comparison.adapter <= bounds.upper


def test_every_resample_has_the_bleu_of_its_answers() -> None:
    random = np.random.default_rng(0)
    texts = [[" ".join(random.choice(WORDS, random.integers(3, 9))) for _ in range(40)]
             for _ in range(2)]  # fmt: skip
    answers, references = texts
    table = scored(list(zip(answers, answers, references, strict=True)))
    summands = METRICS["bleu"].summands(table, "base")
    assert summands is not None
    columns, statistic = summands
    drawn = random.integers(0, 40, (20, 40))
    expected = [oracle([answers[i] for i in d], [references[i] for i in d]) for d in drawn]
    np.testing.assert_allclose(statistic(columns[drawn].sum(axis=1)), expected, atol=1e-9)
    assert statistic is bleu


def test_a_better_corpus_is_above_by_its_bounds() -> None:
    reference = "the red stone lies by the blue river"
    triples = [("red stone river the", f"the red stone lies by the river {n}", reference)
               for n in range(60)]  # fmt: skip
    comparison = METRICS["bleu"].compare(scored(triples))
    assert comparison is not None
    assert 0 < comparison.lower < comparison.difference < comparison.upper < 1


# ── Numbers ─────────────────────────────────────────────────────────────────────────────────────

ASKED = [("4", "7", "7"), ("7", "7", "it is 7"), ("none", "8", "8"), ("9", "1", "9")]
UNASKED = [("4", "5", "no number"), ("a", "b", "")]


def test_numbers_count_where_the_reference_has_one() -> None:
    metric, table = METRICS["number_match"], scored(ASKED + UNASKED)
    comparison = metric.compare(table)
    assert comparison == compare_accuracy([False, True, False, True], [True, True, True, False])
    assert metric.value(table, "adapter") == 0.75
    low, high = metric.bounds(table, "adapter")
    assert 0 < low < 0.75 < high < 1
    assert metric.compare(scored(UNASKED)) is None


def test_what_was_not_measured_is_not_reported() -> None:
    short = every_metric(scored(UNASKED), [], None)
    assert {"bleu", "number_match", "judge", "nats_per_token"}.isdisjoint(short)
    assert list(short) == ["token_f1", "exact_match", "rouge_l", "chrf"]
    whole = every_metric(scored([*ASKED, ("a", "b", "one two three four")]), [], None)
    assert {"bleu", "number_match"} < whole.keys()
    assert whole["number_match"]["n"] == 4


def test_the_stored_keys_are_those_that_the_metrics_read() -> None:
    assert METRICS["bleu"].scores == BLEU_COUNTS
