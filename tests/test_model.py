"""``DomainModel`` on a tiny base: generation, the adapter in use, rows in memory, saved folders."""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_base, make_rows
from support.models import SUITE, Fitted, clear_rows, declared, model_in

from lora_domains.errors import (
    AdapterError,
    AdapterMismatch,
    DataError,
    DomainError,
    LeakError,
    UsageError,
)
from lora_domains.inference.predict import Prediction
from lora_domains.tasks import Classification

# ── Generation ────────────────────────────────────────────────────────────────────────────────────


def test_generate_continues_one_or_several_prompts(fitted: Fitted) -> None:
    model, _ = fitted
    one = model.generate("the red", max_new_tokens=5)
    both = model.generate(["the red", "the blue river of"], max_new_tokens=5)
    assert isinstance(one, str)
    assert both[0] == one
    assert model.generate("the red", domain="spam", max_new_tokens=5) != one
    with model.using("spam"):
        inside = model.generate("the red", max_new_tokens=5)
    assert inside == model.generate("the red", domain="spam", max_new_tokens=5)
    many = model.generate("the red", max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert len(many) == 3
    assert isinstance(many, list)
    with pytest.raises(UsageError, match="Did you mean 'spam'"):
        model.generate("the red", domain="spma")


def test_using_selects_the_adapter_inside_its_block_only(fitted: Fitted, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = fitted
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad():
        base = plain(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, base)
        with model.using("spam") as inside:
            assert inside is model
            moved = model(input_ids=ids).logits
            with model.using(None):
                assert torch.equal(model(input_ids=ids).logits, base)
            assert torch.equal(model(input_ids=ids).logits, moved)
        assert (moved - base).abs().max() > 0.1
        assert torch.equal(model(input_ids=ids).logits, base)
        with pytest.raises(RuntimeError, match="boom"), model.using("spam"):
            raise RuntimeError("boom")
        assert torch.equal(model(input_ids=ids).logits, base)
    with pytest.raises(UsageError, match="Did you mean 'spam'"), model.using("spa"):
        pass


# ── Several adapters ──────────────────────────────────────────────────────────────────────────────


def test_several_adapters_do_not_affect_each_other(
    fitted: Fitted, tiny_base: Path, tmp_path: Path
) -> None:
    rows = make_rows(80, seed=3)
    model = model_in(tmp_path, tiny_base)
    model.load_adapter(fitted[0].out / "spam")  # by path
    model.load_adapter(fitted[0].out / "spam", name="copy")
    ids = torch.tensor([[1, 40, 50, 60, 70]])

    def logits(name: str | None) -> torch.Tensor:
        with torch.no_grad(), model.using(name):
            out: torch.Tensor = model(input_ids=ids).logits
        return out

    spam = logits("spam")
    assert torch.equal(spam, logits("copy"))
    model.fit(declared(rows, "other", Classification(), seed=4, epochs=1))
    assert set(model.domains) == {"spam", "copy", "other"}
    assert torch.equal(logits("spam"), spam)  # untouched by the training beside it
    assert not torch.equal(logits("other"), spam)
    found: dict[str, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda n=name: found.update({n: logits(n)}))  # type: ignore[misc]
        for name in ("spam", "other")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["spam"], spam)
    model.unload("copy")
    assert set(model.domains) == {"spam", "other"}
    fresh = model_in(tmp_path, tiny_base)
    assert fresh.load_adapter("other") == "other"  # by name
    with pytest.raises(AdapterError, match="Did you mean 'other'"):
        fresh.load_adapter("othr")


def test_an_adapter_of_another_base_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    model = model_in(tmp_path, make_base(tmp_path / "elsewhere", seed=1))
    with pytest.raises(AdapterMismatch, match="made on tiny"):
        model.load_adapter(fitted[0].out / "spam")
    assert model.domains == ()


@pytest.mark.parametrize("name", ["items", "type", "train", "forward", "values", "half"])
def test_names_of_module_attributes_are_allowed(
    fitted: Fitted, name: str, tiny_base: Path, tmp_path: Path
) -> None:
    model = model_in(tmp_path, tiny_base)
    assert model.load_adapter(fitted[0].out / "spam", name=name) == name
    ids = torch.tensor([[1, 40, 50]])
    with torch.no_grad(), model.using(name):
        moved = model(input_ids=ids).logits
    assert not torch.equal(moved, model(input_ids=ids).logits)


def test_the_saved_folder_loads_in_plain_peft(fitted: Fitted, tiny_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, _ = fitted
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), str(model.out / "spam")
    ).eval()
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad(), model.using("spam"):
        np.testing.assert_allclose(
            model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5
        )


# ── Rows in memory, and dry runs ──────────────────────────────────────────────────────────────────


def test_fit_on_rows_in_memory(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"note": r["text"], "kind": r["label"]} for r in make_rows(120)]
    model = model_in(tmp_path, tiny_base)
    card = model.fit(
        rows[:90], name="own", text="note", label="kind", positive="spam", test=rows[90:],
        epochs=1, lr=0.01, rank=4,
    )  # fmt: skip
    settings = card.adapter.settings
    assert (settings["lora"]["rank"], settings["training"]["epochs"]) == (4, 1)
    assert settings["task"]["positive"] == "spam"
    assert card.adapter.training["lr"] == 0.01
    assert card.adapter.verdict is None
    assert isinstance(model.predict({"note": "alpha"}, domain="own")[0], Prediction)
    with pytest.raises(UsageError, match="name='spam'"):
        model.fit(rows)
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        model.fit(rows, name="own", text="note", label="kind", epoch=3)
    with pytest.raises(DomainError, match="letters, digits"):
        model.fit(rows, name="../own", text="note", label="kind")
    with pytest.raises(DataError, match="column 'text'"):
        model.fit(rows, name="own")


@pytest.mark.usefixtures("small_suite")
def test_a_dry_run_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path / "out", tiny_base)
    assert model.fit(declared(make_rows(60)), dry_run=True) is None
    assert not (tmp_path / "out").exists()


# ── Other test rows ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_evaluate_takes_other_test_rows_of_any_form(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table, rows and a file are one test set, on the rows that the training split itself."""
    rows = clear_rows(160)
    train, test = pd.DataFrame(rows[:120]), rows[120:]
    monkeypatch.chdir(tmp_path)  # a card names files in it, and none elsewhere
    train.to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(test).to_csv(tmp_path / "test.csv", index=False)
    model = model_in(tmp_path / "out", tiny_base)
    settings = {"positive": "spam", "epochs": 1, "lr": 0.01, "rank": 4}
    trained = model.fit(str(tmp_path / "train.csv"), name="own", **settings).adapter
    before = model.dataset("own")
    by_file = model.evaluate("own", test=str(tmp_path / "test.csv"), suite=SUITE).entry
    assert by_file.domain_scores["f1"]["n"] == 40
    assert {k: by_file.data[k] for k in ("train", "validation")} == {
        k: trained.data[k] for k in ("train", "validation")
    }
    assert by_file.evaluations is not None
    assert by_file.evaluations["number"] == 1
    assert model.dataset("own") is before  # whose test rows are those that were split off
    fresh = model_in(tmp_path / "out", tiny_base)  # which knows the rows by the card alone
    for form in (pd.DataFrame(test), test, Path(tmp_path / "test.csv")):
        entry = fresh.evaluate("own", test=form, suite=SUITE).entry
        assert entry.domain_scores == by_file.domain_scores
        assert entry.evaluations == by_file.evaluations
    assert fresh.evaluate("own", test=test[1:], suite=SUITE).entry.domain_scores["f1"]["n"] == 39
    for wrong, error, words in (
        ([{**test[0], "label": "eggs"}], DataError, "eggs"),
        (pd.DataFrame(test).drop(columns="label"), DataError, "column 'label'"),
        (rows[:40], LeakError, "no test row among"),
        ({"text": "a", "label": "spam"}, DataError, "list of dicts"),
        (str(tmp_path / "nowhere.csv"), DataError, "nowhere.csv"),
    ):
        with pytest.raises(error, match=words):
            fresh.evaluate("own", test=wrong, suite=SUITE)
    own = model.fit(train, name="memory", **settings)
    assert own is not None
    assert model.evaluate("memory", test=test, suite=SUITE).entry.domain_scores["f1"]["n"] == 40
    with pytest.raises(UsageError, match=r"rows in memory.*Declare a Domain"):
        fresh.evaluate("memory", test=test)
