"""Predicted labels: what is passed and refused, and that they agree with the evaluation."""

import json
import os
import subprocess
import sys

import pytest
from support.models import Fitted

from lora_domains.domain import Domain
from lora_domains.errors import DataError, UsageError
from lora_domains.inference.predict import Prediction
from lora_domains.report.card import read_items


def test_predict_takes_strings_and_rows(fitted: Fitted) -> None:
    model, _ = fitted
    one = model.predict("red alpha red alpha alpha alpha", domain="spam")
    rows = model.predict(
        [
            {"text": "red alpha red alpha alpha alpha"},
            {"text": "red beta red beta beta beta", "x": 1},
        ],
        "spam",
    )
    alone, beside = one[0], rows[0]
    assert isinstance(alone, Prediction)
    assert isinstance(beside, Prediction)
    assert alone.label == beside.label
    # A batched product rounds differently.
    assert alone.probabilities == pytest.approx(beside.probabilities, abs=1e-5)
    table = pytest.importorskip("pandas").DataFrame({"text": ["red alpha red alpha alpha alpha"]})
    assert model.predict(table, "spam") == one
    labels = [p.label for p in rows if isinstance(p, Prediction)]
    assert labels == ["spam", "ham"]
    first = one[0]
    assert isinstance(first, Prediction)
    assert sum(first.probabilities.values()) == pytest.approx(1.0)
    assert first.probability == first.probabilities[first.label]
    assert first.probability == max(first.probabilities.values())
    with model.using("spam"):
        assert model.predict("red alpha red alpha alpha alpha")[0] == first


def test_predict_names_what_is_missing(fitted: Fitted) -> None:
    model, _ = fitted
    with pytest.raises(DataError, match=r"input 1, column 'text'.*columns 'txt'"):
        model.predict([{"text": "a"}, {"txt": "b"}], domain="spam")
    with pytest.raises(DataError, match="only whitespace"):
        model.predict("  ", domain="spam")
    with pytest.raises(UsageError, match="a domain to predict for"):
        model.predict("alpha")
    with pytest.raises(UsageError, match="Did you mean 'spam'"):
        model.predict("alpha", domain="spamm")


def test_predict_agrees_with_evaluate(fitted: Fitted, spam: Domain) -> None:
    model, _ = fitted
    test = spam.data.test
    assert isinstance(test, list)
    said = model.predict([row["text"] for row in test], domain="spam")
    items = [i for i in read_items(model.out / "spam") if i["set"] == "test"]
    for prediction, item in zip(said, items, strict=True):
        assert isinstance(prediction, Prediction)
        assert prediction.probability == pytest.approx(
            item["scores"]["adapter"]["confidence"], abs=1e-5
        )


def test_unsure_predictions_are_referred(fitted: Fitted) -> None:
    model, _ = fitted
    texts = ["red alpha alpha alpha", "red green blue"]
    plain = model.predict(texts, domain="spam")
    sure = sorted(p.probability for p in plain if isinstance(p, Prediction))
    between = sum(sure) / 2
    referred = model.predict(texts, domain="spam", refer_below=between)
    for one, other in zip(plain, referred, strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        assert other.label == (one.label if one.probability >= between else "refer")
        assert other.probabilities == one.probabilities
    assert {p.label for p in referred if isinstance(p, Prediction)} >= {"refer"}
    with pytest.raises(UsageError, match="0 to 1"):
        model.predict(texts, domain="spam", refer_below=80)


@pytest.mark.long
@pytest.mark.slow
def test_a_fresh_process_reproduces_the_test_scores(fitted: Fitted, spam: Domain) -> None:
    model, _ = fitted
    test = spam.data.test
    assert isinstance(test, list)
    said = model.predict([row["text"] for row in test], domain="spam")
    code = (
        "import json, sys\n"
        "from lora_domains import DomainModel\n"
        "model = DomainModel.from_pretrained(sys.argv[1], out=sys.argv[2], device='cpu')\n"
        "model.load_adapter('spam')\n"
        "texts = json.load(sys.stdin)\n"
        "print(json.dumps([p.probabilities for p in model.predict(texts, domain='spam')]))\n"
    )
    base = model.base.model.config._name_or_path
    done = subprocess.run(
        [sys.executable, "-c", code, base, str(model.out)], capture_output=True, text=True,
        input=json.dumps([row["text"] for row in test]), env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(said, json.loads(done.stdout), strict=True):
        assert isinstance(mine, Prediction)
        assert mine.probabilities == pytest.approx(theirs, abs=1e-6)
