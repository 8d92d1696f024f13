"""Numbers to predict: cells, scale, and a fit from rows to predictions."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.models import SUITE, declared, model_in
from support.rows import SECRET, row
from transformers import AutoModelForSequenceClassification

from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.errors import AdapterError, DataError, DomainError, EmptyCell
from lora_domains.modeling.base import load_base
from lora_domains.modeling.heads import features, head_logits, head_nats, new_head, own_layout
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.tasks import Classification, Number
from lora_domains.tasks.number import number_in
from lora_domains.tokenization.encoded import EncodedExample


def rated(count: int) -> list[dict[str, Any]]:
    """Rows whose number is said by how often a word occurs, far from 0 and from 1."""
    return [
        {"text": f"{made['text']}{' alpha' * (n % 5)}", "score": 1000.0 + 50 * (n % 5) + n % 3}
        for n, made in enumerate(make_rows(count))
    ]


# ── Cells ───────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_every_form_of_a_number_is_read(number: float) -> None:
    expected = float(number)
    for cell in (number, repr(number), f" {number!r} ", Decimal(number), np.float64(number)):
        assert number_in(row(x=cell), "x") == pytest.approx(expected)
    if abs(expected) < 1e12:
        written = f"{expected:.3f}".replace(".", ",")
        assert number_in(row(x=written), "x", ",") == pytest.approx(round(expected, 3), abs=1e-3)


@pytest.mark.parametrize(
    ("cell", "decimal", "found"),
    [("3,5", ".", "a comma"), ("1,234.5", ".", "something else"), ("1,234", ".", "a comma"),
     ("three", ".", "something else"), ("nan", ".", "something else"), ("1e999", ".", "inf"),
     (math.inf, ".", "inf"), (True, ".", "a truth value"), ("1.5", ",", "something else"),
     ("1.234e3", ",", "something else"), (".5,5", ",", "something else"), (",5", ".", "a comma"),
     ([1.0], ".", "something else"), ("5 %", ".", "something else")],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused_by_line(
    cell: object, decimal: str, found: str
) -> None:
    message = f"line 2, column 'x': expected a finite number; found {found}"
    with pytest.raises(DataError, match=message):
        number_in(row(x=cell), "x", decimal)


def test_a_decimal_comma_has_a_flag_and_points_between_thousands() -> None:
    with pytest.raises(DataError, match=r"--decimal ,"):
        number_in(row(x="3,5"), "x")
    assert number_in(row(x="1.234,5"), "x", ",") == 1234.5
    for cell, number in {
        "-12": -12,
        "1e3": 1000,
        "-1,5E-2": -0.015,
        ".5": 0.5,
        "-,5": -0.5,
    }.items():
        assert number_in(row(x=cell), "x", ",") == number


@pytest.mark.parametrize(("cell", "decimal", "message"), [
    ("1,234.50", ".", "Remove the commas between thousands"),
    ("12 %", ".", "without its unit"), ("$12", ".", "without its unit"),
    ("3,5 kg", ",", "without its unit"), ("0.234", ",", "Correct it"),
    ("12 percent", ".", "Correct it"),
])  # fmt: skip
def test_what_is_nearly_a_number_says_what_to_do(cell: str, decimal: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        number_in(row(x=cell), "x", decimal)
    assert cell not in str(caught.value)


def test_a_minus_sign_is_a_minus() -> None:
    assert number_in(row(x="\u22125"), "x") == -5
    assert number_in(row(x="\u22121.234,5"), "x", ",") == -1234.5


@pytest.mark.parametrize("cell", [None, float("nan"), "", "  "])
def test_an_empty_cell_is_missing(cell: object) -> None:
    with pytest.raises(EmptyCell):
        number_in(row(x=cell), "x")


def test_no_message_quotes_a_cell() -> None:
    with pytest.raises(DataError) as caught:
        Number().example(row(text="x", label=SECRET))
    assert SECRET not in str(caught.value)


def test_cells_propose_the_task_where_many_numbers_differ() -> None:
    def proposed(*cells: object) -> bool:
        return Number.from_cells([row(n, y=cell) for n, cell in enumerate(cells)], "y") is not None

    assert proposed(*(n / 7 for n in range(60)))
    assert proposed(*(str(3 * n) for n in range(60)))
    assert not proposed(*(n % 10 for n in range(200)))  # stars, or numbers of classes
    assert not proposed(*(n % 77 for n in range(1000)))
    assert not proposed(*([0.0, 1.0, 0.5] * 20))
    assert not proposed(*(n / 7 for n in range(60)), "spam")


def test_decimal_commas_are_proposed_where_they_cannot_be_between_thousands() -> None:
    def proposed(*cells: str) -> tuple[Number, str] | None:
        return Number.from_cells([row(n, y=cell) for n, cell in enumerate(cells)], "y")

    prices = [f"{n},{n:02}" for n in range(30)]
    task, why = proposed("1.234,50", *prices) or (None, "")
    assert task == Number(label="y", decimal=",")
    assert why == "y holds 31 different numbers in 31 rows, with decimal commas"
    assert proposed(*(f"{n},500" for n in range(30))) is None  # 1,500 may be 1500
    assert proposed("1.5", *prices) is None


# ── The scale ───────────────────────────────────────────────────────────────────────────────────


def test_points_between_thousands_are_told_from_decimal_ones() -> None:
    def proposed(*cells: str) -> tuple[Number, str] | None:
        return Number.from_cells([row(n, y=cell) for n, cell in enumerate(cells)], "y")

    german = [f"{n:,}".replace(",", ".") for n in range(900, 1200, 7)]
    found = proposed(*german)
    assert found is not None
    assert found[0].decimal == ","
    assert "points between thousands" in found[1]
    assert number_in(row(y="1.015"), "y", found[0].decimal) == 1015
    for cells in (
        [f"{n / 1000:.3f}" for n in range(900, 1200, 7)],
        [f"{n / 7}" for n in range(40)],
    ):
        found = proposed(*cells)
        assert found is not None
        assert found[0].decimal == "."


def test_the_scale_is_that_of_the_training_rows_alone() -> None:
    rows = rated(60)
    far = [{"text": f"{one['text']} river", "score": 9e6} for one in rows[:20]]
    task = prepare(Number(label="score"), Data(rows, rows[:0] or None, far)).task
    prepared = prepare(Number(label="score"), Data(rows, far[:10], far[10:]))
    values = [one.truth[0] for one in prepared.train]
    assert prepared.task.scale == pytest.approx((np.mean(values), np.std(values)))
    assert max(values) < 2000
    assert task.scale != prepared.task.scale  # other rows were split off
    given = prepare(Number(label="score", mean=0, sd=2), Data(rows, far[:10], far[10:]))
    assert given.task.scale == (0, 2)


def test_numbers_whose_sum_is_too_large_are_refused() -> None:
    rows = [{**one, "score": 1e308 - n * 1e300} for n, one in enumerate(rated(60))]
    with pytest.raises(DataError, match="a spread of inf"):
        prepare(Number(label="score"), Data(rows))


def test_numbers_that_are_all_the_same_are_refused() -> None:
    rows = [{**one, "score": 3} for one in rated(60)]
    with pytest.raises(DataError, match="numbers that differ"):
        prepare(Number(label="score"), Data(rows))


@pytest.mark.parametrize("options", [{"head": False}, {"decimal": ";"}, {"mean": 1, "sd": 0.0}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DomainError):
        Number(**options)


# ── The head ────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_is_half_the_squared_error_in_standard_deviations(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    head = new_head(base, own_layout(base), 1)
    numbers = [1010.0, 980.0]
    rows = [EncodedExample(str(n), (5, 9, 20 + n), (), truth=(y,)) for n, y in enumerate(numbers)]
    with torch.no_grad():
        found = head_nats(base.model, head, rows, 0, Number(mean=1000, sd=10))
        outputs = head_logits(head, features(base.model, rows, 0))[:, 0]
    expected = ((outputs - torch.tensor([1.0, -2.0])) ** 2).sum() / 2
    torch.testing.assert_close(found, expected)


def test_a_number_is_fitted_evaluated_and_predicted_in_its_unit(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = rated(200)
    domain = declared(rows, "ratings", Number(label="score"), epochs=3, retention="none")
    model = model_in(tmp_path, tiny_base)
    history = model.fit(domain).adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]
    assert not history[-1]["higher_is_better"]

    entry = model.evaluate(domain, suite=SUITE).entry
    scores = entry.domain_scores
    assert scores.keys() == {"mae", "rmse", "r2", "spearman", "loss"}
    assert scores["mae"]["baselines"].keys() == {"median", "tfidf"}
    assert scores["mae"]["adapter"] < scores["mae"]["baselines"]["median"]
    assert scores["spearman"]["adapter"] > 0.5
    (gain,) = [gate for gate in entry.gates if gate["name"] == "gain"]
    assert gain["rule"].startswith("absolute error below the base")
    assert not entry.confusion
    assert not entry.per_class
    assert rebuild(tmp_path / "ratings") == Card.read(tmp_path / "ratings")

    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter(tmp_path / "ratings")
    texts = [one["text"] for one in rows[:5]]
    answers = fresh.predict(texts, domain="ratings")
    mean, sd = (entry.task[name] for name in ("mean", "sd"))
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    theirs = PeftModel.from_pretrained(classifier, tmp_path / "ratings").eval()
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([fresh.tokenizer(text)["input_ids"]])
            output = float(theirs(input_ids=ids).logits)
        assert answer == pytest.approx(mean + sd * output, abs=1e-3)
        assert isinstance(answer, float)
        assert 900 < answer < 1400
    assert f"{sd:.8g} times the output" in (tmp_path / "ratings" / "README.md").read_text()

    other = declared(make_rows(60), "ratings", Classification(head=True))
    with pytest.raises(AdapterError, match="a head"):
        fresh.fit(other, init_from="ratings", name="more")
    # A continued head predicts on the scale that it was trained on.
    again = declared(rated(100), "ratings", Number(label="score"), epochs=1, retention="none")
    more = fresh.fit(again, init_from="ratings", name="more")
    assert (more.adapter.task["mean"], more.adapter.task["sd"]) == (mean, sd)
