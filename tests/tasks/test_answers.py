"""Scores of generated answers against SQuAD's script, rouge-score and sacrebleu."""

import collections
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lora_domains.tasks.answers import (
    ALWAYS,
    BLEU_COUNTS,
    answer_scores,
    last_number,
    number_score,
    squad_tokens,
)

WORDS = st.sampled_from(
    ("the", "The", "a", "an", "cat", "cat's", "sat,", "3.5", "3,500", "THE-END", "x_y", "-", "…")
)
ASCII = st.lists(WORDS.filter(str.isascii), max_size=12).map(" ".join)
ANY = st.one_of(st.lists(WORDS, max_size=12).map(" ".join), st.text(max_size=30))

# ── SQuAD ───────────────────────────────────────────────────────────────────────────────────────


def normalize_answer(s: str) -> str:
    """As in evaluate-v2.0.py of SQuAD."""

    def remove_articles(text: str) -> str:
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """As in evaluate-v2.0.py of SQuAD."""
    gold_toks = normalize_answer(a_gold).split()
    pred_toks = normalize_answer(a_pred).split()
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@given(ANY, ANY)
def test_exact_match_and_token_f1_are_those_of_squad(text: str, reference: str) -> None:
    scores = answer_scores(text, reference)
    assert squad_tokens(text) == normalize_answer(text).split()
    assert scores["exact"] == (normalize_answer(text) == normalize_answer(reference))
    assert scores["f1"] == pytest.approx(compute_f1(reference, text))


# ── rouge-score and sacrebleu ───────────────────────────────────────────────────────────────────


@given(ASCII, ASCII)
def test_rouge_l_is_that_of_rouge_score(text: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert answer_scores(text, reference)["rouge_l"] == pytest.approx(expected)


def test_words_of_other_scripts_count_in_rouge_l() -> None:
    assert answer_scores("Die größte Übung", "die größte übung")["rouge_l"] == 1
    assert answer_scores("красный камень", "синий камень")["rouge_l"] == pytest.approx(0.5)


def test_marks_are_part_of_words_in_rouge_l() -> None:
    assert answer_scores("की", "का")["rouge_l"] == 0
    assert answer_scores("हिन्दी भाषा", "हिन्दी भाषा।")["rouge_l"] == 1
    assert answer_scores("e\u0301te\u0301", "\u00e9t\u00e9")["rouge_l"] == 1


@settings(max_examples=50)
@given(ANY, ANY)
def test_chrf_and_the_counts_of_bleu_are_those_of_sacrebleu(text: str, reference: str) -> None:
    scores = answer_scores(text, reference)
    assert scores["chrf"] == pytest.approx(CHRF().sentence_score(text, [reference]).score / 100)
    whole = BLEU().corpus_score([text], [[reference]])
    counts = [whole.sys_len, whole.ref_len, *whole.counts]
    assert [scores[key] for key in BLEU_COUNTS] == counts
    assert whole.totals == [max(0, whole.sys_len - n) for n in range(4)]


# ── All of them ─────────────────────────────────────────────────────────────────────────────────


@given(ANY, ANY)
def test_every_pair_has_the_same_scores_and_a_number_where_the_reference_has_one(
    text: str, reference: str
) -> None:
    scores = answer_scores(text, reference)
    asked = last_number(reference) is not None
    assert scores.keys() == ALWAYS | ({"number"} if asked else set())
    shares = [scores[key] for key in scores.keys() - {*BLEU_COUNTS}]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)


def test_numbers_are_compared_by_the_last_one() -> None:
    assert number_score("4 + 3 is 1,007", "#### 1007") == {"number": 1.0}
    assert number_score("1007, no, 8", "#### 1007") == {"number": 0.0}
    assert number_score("none", "#### 1007") == {"number": 0.0}
    assert number_score("7", "seven") == {}


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [("2,5", "3,5", False), ("0,75", "0.75", True), ("9,56 €", "1.234,56 €", False),
     ("1 234", "5 234", False), ("1 234", "1234", True), ("1\u202f234,5", "1234.5", True),
     ("1'234", "5'234", False), ("1’234.50", "1234.5", True), ("1.000.000", "5.000.000", False),
     ("1.000.000", "1e6", True), ("-$5", "$5", False), ("-€5", "\u22125", True),
     ("1,00,000", "100000", True), ("1,234", "1234", True), ("0,234", "234", False),
     ("in 1995 100 people", "100", True), ("1.2.3", "3", True), ("(1, 2, 4)", "4", True)],
)  # fmt: skip
def test_numbers_are_the_same_in_any_notation(text: str, reference: str, same: bool) -> None:
    assert number_score(text, reference) == {"number": float(same)}
    assert number_score(reference, text) == {"number": float(same)}


@pytest.mark.parametrize(
    ("text", "number"),
    [("it is .5", 0.5), ("$.50", 0.5), ("-.5.", -0.5), ("No.5", 5), ("1.2.3", 3), ("is 7...5", 5),
     ("\u22125", -5), ("x=\u20135", -5), ("pages 3-4", 4), ("pages 3\u20134", 4), ("COVID-19", 19),
     ("(3)-4", 4), ("3,4", 4), ("-1,234,567.5", -1234567.5), ("1,00,000", 100000), ("5, no", 5),
     ("1e3", 1000), ("2.5E-1", 0.25), ("1e3f", 3), ("about", None)],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number
