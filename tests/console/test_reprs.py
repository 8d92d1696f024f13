"""Predictions and models as Python and notebooks show them."""

import pickle
import sys
from typing import Any

import pandas as pd
import pytest
from support.models import Fitted

from lora_domains.console.reprs import Predictions
from lora_domains.errors import UsageError
from lora_domains.inference.predict import Labels, Prediction


def prediction(chance: float) -> Prediction:
    return Prediction("spam", chance, {"spam": chance, "<i>ham</i>": 1 - chance})


def test_predictions_become_a_table_with_the_index_of_their_texts() -> None:
    answers = Predictions([prediction(0.9), prediction(0.6)], pd.Index(["x", "y"]))
    table = answers.to_frame()
    assert list(table.index) == ["x", "y"]
    assert list(table) == ["prediction", "probability", "probability_spam",
                           "probability_<i>ham</i>"]  # fmt: skip
    assert table.loc["y", "probability_spam"] == 0.6
    assert list(Predictions([prediction(0.5)]).to_frame().index) == [0]


def test_every_kind_of_answer_becomes_a_row() -> None:
    labels = Labels(("a", "b"), {"a": 0.8, "b": 0.7}, "a; b")
    table = Predictions([labels, "a text", 2.5]).to_frame()
    assert list(table["prediction"]) == ["a; b", "a text", 2.5]
    assert table["probability_a"].isna().tolist() == [False, True, True]


def test_predictions_are_a_list() -> None:
    answers = Predictions([prediction(0.9)], [7])
    assert answers == [prediction(0.9)]
    copied = pickle.loads(pickle.dumps(answers))
    assert (copied, copied.row_index) == (answers, [7])
    assert repr(answers) == f"[{prediction(0.9)!r}]"


def test_many_predictions_are_cut_and_many_labels_left_out() -> None:
    labels = {f"label {n}": 1 / 30 for n in range(30)}
    answers = Predictions([Prediction("label 1", 1 / 30, labels)] * 1000)
    assert repr(answers).endswith(", … 980 more]")
    page = answers._repr_html_()
    assert "… 980 more" in page
    assert page.count("<tr>") == 21
    assert "label 29" not in page


def test_a_page_of_predictions_is_escaped() -> None:
    page = Predictions([prediction(0.9), "<b>text</b>"])._repr_html_()
    assert "<i>" not in page
    assert "<b>" not in page
    assert "0.9000" in page


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pip install 'lora-domains\[notebook\]'"):
        Predictions([prediction(0.9)]).to_frame()


def test_a_model_answers_a_table_or_a_column_and_keeps_the_index(fitted: Fitted) -> None:
    model, _ = fitted
    rows = pd.DataFrame({"text": ["win alpha", "beta now"], "id": [4, 9]}).set_index("id")
    found: Any
    for texts in (rows, rows["text"]):
        found = model.predict(texts, "spam")
        joined = rows.join(found.to_frame())
        assert list(joined.index) == [4, 9]
        assert joined["prediction"].notna().all()
    assert found == model.predict(list(rows["text"]), "spam")


def test_a_model_in_python_and_in_a_notebook(fitted: Fitted) -> None:
    model, evaluation = fitted
    base = f"{model.base.id}: 0.0 M parameters, float32, "
    assert repr(model).startswith(f"<DomainModel {base}")
    assert repr(model).endswith(": spam>")
    page = model._repr_html_()
    assert base in page
    assert f"{evaluation.verdict}, F1" in page
    assert repr(model.dataset("spam")).startswith("<Dataset spam: ")
