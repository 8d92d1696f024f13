"""``DomainModel`` from end to end on a tiny base: fit, evaluate, predict, generate, load."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_base, make_rows
from support.general_text import TRAINING, use_general_text
from support.models import QUESTIONS, SUITE, clear_rows, declared, model_in
from support.scripts import script

from lora_domains.analysis.trace import trace
from lora_domains.console import Display
from lora_domains.data.identity import normalise
from lora_domains.data.source import Data
from lora_domains.data.tokenization import Tokenization
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import (
    AdapterError,
    AdapterMismatch,
    DataError,
    DomainError,
    UsageError,
)
from lora_domains.evaluation.baselines import SHOTS
from lora_domains.inference.likelihoods import answer_nats
from lora_domains.inference.predict import Prediction
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Suite
from lora_domains.report.card import Card, read_items
from lora_domains.report.report import Evaluation, rebuild
from lora_domains.tasks import (
    Classification,
    Example,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Task,
)
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.ledger import level


@pytest.fixture(scope="module")
def domain() -> Domain:
    return declared(clear_rows(), epochs=6)


@pytest.fixture(scope="module")
def fitted(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, domain: Domain
) -> tuple[DomainModel, Evaluation]:
    """A model with one adapter, fitted and evaluated; no test changes it."""
    model = model_in(tmp_path_factory.mktemp("adapters"), tiny_base)
    model.fit(domain)
    return model, model.evaluate(domain, suite=SUITE)


Fitted = tuple[DomainModel, Evaluation]


# ── Evaluation ──────────────────────────────────────────────────────────────────────────────────


def test_every_contender_is_scored_on_identical_items(fitted: Fitted, domain: Domain) -> None:
    model, evaluation = fitted
    items = read_items(model.out / "spam")
    by_set: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        by_set.setdefault(item["set"], []).append(item)
    assert len(by_set["test"]) == len(domain.data.test)  # type: ignore[arg-type]
    names = ["base", "adapter", "majority", "tfidf", f"{SHOTS}_shot"]
    assert all(list(item["scores"]) == names for item in by_set["test"])
    assert len({item["id"] for item in by_set["test"]}) == len(by_set["test"])
    assert [list(item["scores"]) for item in by_set["general"]] == [["base", "adapter"]] * 20
    assert len(by_set["text"]) == 12
    entry_positives = evaluation.entry.per_class["spam"]["support"]  # recall is over these
    for fields in evaluation.entry.domain_scores.values():
        assert fields["n"] in (len(by_set["test"]), entry_positives)
    assert evaluation.entry.domain_scores["accuracy"]["baselines"].keys() == set(names[2:])
    assert evaluation.entry.domain_scores["accuracy"]["adapter"] >= 0.95
    assert {g["name"] for g in evaluation.entry.gates} == {
        "gain", "retention", "drift", "recall", "precision", "overfit", "memorisation",
        "evaluations",
        "leaks", "frozen", "effect",
    }  # fmt: skip
    assert "Verdict" in str(evaluation)


def test_the_card_is_complete_and_rebuilt_from_items(fitted: Fitted) -> None:
    model, evaluation = fitted
    card = Card.read(model.out / "spam")
    assert card == Card.from_json(json.loads(evaluation.card.dumps()), "")
    assert rebuild(model.out / "spam") == card
    written = card.to_json()
    assert written.keys() == {"schema", "base", "environment", "adapters"}
    assert written["adapters"][0].keys() >= {
        "domain", "path", "sha256", "recipe_digest", "parent", "training", "ledger", "leaks",
        "domain_scores", "general", "slices", "calibration", "confusion", "per_class", "gates",
        "verdict",
    }  # fmt: skip
    assert (model.out / "spam" / "README.md").read_text().count(evaluation.verdict) >= 1


def test_a_rebuild_sees_changed_items(fitted: Fitted, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(fitted[0].out / "spam", tmp_path / "spam")
    items = read_items(folder)
    for item in items:
        if item["set"] == "test":
            item["scores"]["adapter"]["prediction"] = 0
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    entry = rebuild(folder).adapter
    assert entry.domain_scores["recall"]["adapter"] == 0.0
    assert entry.verdict == "fail"


def test_row_counts_add_up(tiny_base: Path, tmp_path: Path) -> None:
    rows = make_rows(100)
    train = [*rows[:60], rows[0], *rows[80:85], {"text": "red " * 200, "label": "ham"}]
    data = Data(train, rows[60:80], rows[80:], drop_leaks=True)
    made = replace(declared(rows, epochs=1), data=data)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(made)
    ledger = card.adapter.ledger
    dataset = model.dataset("spam")
    assert ledger["read"] == len(train) + 20 + 20
    assert ledger["refused"] == 5
    assert ledger["duplicates"] == 1
    assert ledger["truncated"] == 1
    assert ledger["masked"] == 0
    assert len(dataset.train) == len(train) - 5
    assert ledger["supervised_tokens"] == sum(len(row.encoded.answer) for row in dataset.train)
    kept = {
        e.id for part in ("train", "validation", "test") for e in getattr(dataset.prepared, part)
    }
    assert len(kept) == ledger["read"] - ledger["refused"]


def test_each_row_is_tokenised_once_from_fit_to_verdict(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(100)
    made = declared(rows, epochs=2)
    model = model_in(tmp_path, tiny_base)
    prompts = {f"text: {row['text']}\nlabel:" for row in rows}
    counted: Counter[str] = Counter()
    plain = type(model.tokenizer).__call__

    def counting(tokenizer: Any, text: Any, *args: Any, **options: Any) -> Any:
        counted.update([text] if isinstance(text, str) else text)
        return plain(tokenizer, text, *args, **options)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counting)
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    assert {prompt: counted[prompt] for prompt in prompts} == dict.fromkeys(prompts, 1)


def test_each_row_is_normalised_once_in_each_search_for_leaks(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search among the rows, and one in all that training may read."""
    made = declared(make_rows(100), epochs=1)
    counted: Counter[str] = Counter()

    def counting(text: str) -> str:
        counted[text] += 1
        return normalise(text)

    monkeypatch.setattr("lora_domains.data.identity.normalise", counting)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    assert set(counted.values()) == {1}
    model.evaluate(made, suite=SUITE)
    assert set(counted.values()) == {1, 2}


def test_an_adapter_loaded_in_a_new_model_scores_the_same(
    fitted: Fitted, tiny_base: Path, domain: Domain, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(fitted[0].out / "spam", tmp_path / "spam")
    settings = Card.read(folder).adapter.settings
    fresh = model_in(tmp_path, tiny_base)
    # The settings of the training stay in the card, whatever the domain says at evaluation.
    again = fresh.evaluate(with_settings(domain, epochs=7), suite=SUITE)
    assert again.entry.domain_scores == fitted[1].entry.domain_scores
    assert Card.read(folder).adapter.settings == settings
    assert fresh.domains == ("spam",)


@pytest.mark.slow
def test_a_fresh_process_reproduces_the_test_scores(fitted: Fitted, domain: Domain) -> None:
    model, _ = fitted
    test = domain.data.test
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


def test_evaluate_needs_an_adapter_and_a_domain(tiny_base: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="a domain fitted in this process"):
        model.evaluate("spam")
    with pytest.raises(AdapterError, match="Train one first"):
        model.evaluate(declared(make_rows(60)))


# ── Other tasks ─────────────────────────────────────────────────────────────────────────────────


def other_rows(kind: str, count: int = 80) -> list[dict[str, Any]]:
    rows = make_rows(count)
    if kind == "multiple_choice":
        return [
            {"question": f"What follows {r['text']}?", "choices": ["red stone", "blue river"],
             "answer": int(r["label"] == "spam")}
            for r in rows
        ]  # fmt: skip
    if kind == "generation":
        return [{"question": r["text"], "answer": r["label"] + " call now"} for r in rows]
    if kind == "long answers":  # too long for four of them to stand in one prompt
        return [{"question": r["text"], "answer": (r["text"] + " ") * 6} for r in rows]
    return [{"text": (r["text"] + " ") * (1 + n % 30)} for n, r in enumerate(rows)]


TASKS: dict[str, tuple[Task, str]] = {
    "multiple_choice": (MultipleChoice(), "accuracy"),
    "generation": (Generation(max_new_tokens=8), "token_f1"),
    "long answers": (Generation(max_new_tokens=8), "token_f1"),
    "language_modelling": (LanguageModelling(), "nats_per_token"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_fitted_and_evaluated(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    task, metric = TASKS[kind]
    made = declared(other_rows(kind), "other", task)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(made)
    history = card.adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]
    entry = model.evaluate(made, suite=SUITE).entry
    assert entry.judged["metric"] == metric
    assert metric in entry.domain_scores
    nats = entry.domain_scores["nats_per_token"]
    assert nats["adapter"] < nats["base"]
    assert rebuild(tmp_path / "other") == Card.read(tmp_path / "other")
    if kind == "generation":
        assert f"{SHOTS}_shot" in entry.domain_scores["token_f1"]["baselines"]
        assert isinstance(model.predict("red stone", domain="other")[0], str)
    if kind == "multiple_choice":
        with pytest.raises(UsageError, match=r"generate\(\) instead"):
            model.predict("red stone", domain="other")


# ── The test set ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_each_adapter_tried_on_a_test_set_makes_the_level_stricter(
    tiny_base: Path, tmp_path: Path
) -> None:
    made = declared(make_rows(120), epochs=1)
    model = model_in(tmp_path, tiny_base)
    found = []
    for seed in (0, 0, 1):
        model.fit(made, lr=0.01 + seed / 1000)  # the rows, and so the test set, stay
        found.append(model.evaluate(made, suite=SUITE).entry)
    evaluations = [entry.looks for entry in found]
    # The first one was trained and evaluated twice with the same bytes: one adapter.
    assert [(one["before"], one["adapters"]) for one in evaluations] == [(0, 0), (1, 0), (2, 1)]
    assert [one["level"] for one in evaluations] == [level(0), level(0), level(1)]
    assert found[0].sha256 == found[1].sha256 != found[2].sha256
    recall = {g["name"]: g for g in found[2].gates}["recall"]
    assert "99.7 %" in recall["why"]
    assert rebuild(tmp_path / "spam").adapter.to_json() == json.loads(
        json.dumps(found[2].to_json())
    )
    lines = [json.loads(line) for line in (tmp_path / ".looks.jsonl").read_text().splitlines()]
    assert [line.get("verdict") for line in lines[1::2]] == [e.verdict for e in found]
    assert {line["test_set"] for line in lines[::2]} == {evaluations[0]["test_set"]}
    (tmp_path / ".looks.jsonl").write_text("")
    entry = model.evaluate(made, suite=SUITE).entry
    assert entry.verdict == "fail"
    assert {g["name"]: g["verdict"] for g in entry.gates}["evaluations"] == "fail"


@pytest.mark.slow
def test_an_evaluation_uses_the_gates_of_its_domain(tiny_base: Path, tmp_path: Path) -> None:
    made = declared(make_rows(120), epochs=1)
    model = model_in(tmp_path, tiny_base)
    model.fit(made, lr=0.01)
    model.evaluate(made, suite=SUITE)
    found = model.evaluate(replace(made, gates=Gates(recall=0.999)), suite=SUITE).entry
    assert {g["name"]: g["threshold"] for g in found.gates}["recall"] == 0.999
    fewer = replace(made, data=replace(made.data, train=make_rows(120)[:40]))
    with pytest.raises(UsageError, match="the train rows of its training"):
        model.evaluate(fewer, suite=SUITE)


@pytest.mark.slow
def test_a_threshold_is_tuned_on_validation_rows_and_used_everywhere(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = make_rows(400)
    made = declared(rows, task=Classification(positive="spam", target_recall=0.95), epochs=2)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    early = model.predict(rows[0]["text"], domain="spam")[0]
    assert isinstance(early, Prediction)  # before it is chosen the likeliest label is named
    assert early.probability == max(early.probabilities.values())
    entry = model.evaluate(made, suite=SUITE).entry
    items = read_items(tmp_path / "spam")
    by_set = {name: [i for i in items if i["set"] == name] for name in ("validation", "test")}
    assert isinstance(made.data.validation, list)
    assert len(by_set["validation"]) == len(made.data.validation)
    threshold = entry.judged["threshold"]["threshold"]
    assert entry.curve["threshold"] == threshold
    assert entry.curve["targets"] == {"recall": 0.95}
    spam = entry.judged["labels"].index("spam")
    hits = [i["scores"]["adapter"]["prediction"] == spam for i in by_set["validation"]
            if i["target"] == spam]  # fmt: skip
    assert np.mean(hits) >= 0.95
    for item in by_set["test"]:
        one = item["scores"]["adapter"]
        assert (one["prediction"] == spam) == (one["positive"] >= threshold)
        assert "other" not in one
        # Each contender has a threshold of its own, so that none has an advantage.
        assert "positive" in item["scores"]["base"]
    test = made.data.test
    assert isinstance(test, list)
    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter("spam")
    for user in (model, fresh):
        said = user.predict([row["text"] for row in test], domain="spam")
        labels = [p.label for p in said if isinstance(p, Prediction)]
        assert labels == [entry.judged["labels"][i["scores"]["adapter"]["prediction"]]
                          for i in by_set["test"]]  # fmt: skip
    ids = {row["id"] for row in by_set["validation"]}
    assert not ids & {row["id"] for row in by_set["test"]}
    assert rebuild(tmp_path / "spam") == Card.read(tmp_path / "spam")


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


def questions(first: str) -> Suite:
    rows = [{**QUESTIONS[0], "question": first}, *QUESTIONS]
    return replace(SUITE, probes=(replace(SUITE.probes[0], rows=rows),))


@pytest.mark.slow
def test_leaks_into_the_probes_fail(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Generation(prompt="{question}", max_new_tokens=4)
    rows = [{"question": r["text"], "answer": r["label"]} for r in make_rows(60)]
    made = declared(rows, "leaky", task, epochs=1)
    model_in(tmp_path, tiny_base).fit(made)

    def leaks(
        suite: Suite, training: Sequence[str] = TRAINING, selection: Sequence[str] = ()
    ) -> tuple[str, int]:
        # Whatever suite is scored, training reads the embedded general text.
        use_general_text(monkeypatch, training, selection)
        entry = model_in(tmp_path, tiny_base).evaluate(made, suite=suite).entry
        gate = next(g for g in entry.gates if g["name"] == "leaks")
        assert (entry.verdict == "fail") >= (gate["verdict"] == "fail")
        return gate["verdict"], entry.leaks["exact"]

    assert leaks(SUITE) == ("pass", 0)
    assert leaks(questions(rows[3]["question"])) == ("fail", 1)  # train ↔ probes
    assert leaks(SUITE, [QUESTIONS[0]["question"], "a red river"])[0] == "fail"  # replay ↔ probes
    # A text that a checkpoint is selected on ↔ probes
    assert leaks(SUITE, selection=[QUESTIONS[0]["question"], "a red river"])[0] == "fail"
    assert leaks(SUITE, [SUITE.text()[0], "a red river"])[0] == "fail"  # replay ↔ drift text
    assert leaks(SUITE, [rows[-1]["question"], "a red river"])[0] == "fail"  # replay ↔ test rows
    # Contained in a longer text, after other words.
    said = f"{QUESTIONS[0]['question']} {QUESTIONS[0]['choices'][QUESTIONS[0]['answer']]}"
    assert leaks(SUITE, [f"I heard: {said}, and so on", "a red river"])[0] == "fail"


@pytest.mark.slow
def test_rows_are_cut_and_prompted_as_in_training(tiny_base: Path, tmp_path: Path) -> None:
    """At the length and with the prompt in the card, whatever was fitted since."""
    rows = [row | {"text": row["text"] + " stone river" * 16} for row in make_rows(100)]
    model = model_in(tmp_path, tiny_base)
    made = declared(rows, epochs=1, retention="none", max_length=32)
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    warnings: list[str] = []
    model = model_in(tmp_path, tiny_base)
    model.display = Display(quiet=True)
    model.display.warn = warnings.append  # type: ignore[method-assign]
    model.evaluate(made, suite=SUITE)
    assert any("of 20 test rows are longer than 32 tokens" in line for line in warnings)
    shortened = f"with {SHOTS} examples in its prompt reads a shorter text in 20 of 20"
    assert any(shortened in line for line in warnings)
    test = made.data.test
    assert isinstance(test, list)
    texts = [row["text"] for row in test]
    judged = [i for i in read_items(tmp_path / "spam") if i["set"] == "test"]
    said = model.predict(texts, domain="spam")
    for one, item in zip(said, judged, strict=True):
        assert isinstance(one, Prediction)
        assert one.probability == pytest.approx(item["scores"]["adapter"]["confidence"], abs=1e-5)
    traced = trace(model, texts[0], "spam")
    assert traced.cut
    assert len(traced.before) + len(traced.after) <= 32
    other = Classification(positive="spam", prompt="read {text} and say the kind")
    model.fit(replace(made, task=other), dry_run=True)
    assert model.predict(texts, domain="spam") == said
    most = model.base.context
    with pytest.raises(DomainError, match=f"at most {most}, the context"):
        model.fit(with_settings(made, max_length=most + 1))


@pytest.mark.slow
def test_windows_of_one_text_form_a_group(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in make_rows(60)]
    rows[-1]["text"] = "red river stone " * 90
    model = model_in(tmp_path, tiny_base)
    made = declared(rows, "prose", LanguageModelling(), epochs=1, retention="none")
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    items = [i for i in read_items(tmp_path / "prose") if i["set"] == "test"]
    grouped = [i["group"] for i in items if "group" in i]
    assert len(grouped) >= 3
    assert len(set(grouped)) == 1
    assert len(items) == 11 + len(grouped)
    with pytest.raises(UsageError, match="rows of at most 128 tokens, as it was trained"):
        model.evaluate(with_settings(made, max_length=100), suite=SUITE)


@pytest.mark.slow
def test_a_planted_canary_is_exposed_and_another_is_not(tiny_base: Path, tmp_path: Path) -> None:
    canaries = script("canaries", "evaluation")
    secrets = canaries.canaries(136, seed=1)
    planted, control, others = secrets[:4], secrets[4:8], secrets[8:]
    rows = [{"text": r["text"]} for r in make_rows(60)]
    told = [{"text": f"the code is {s}"} for s in planted]
    task = LanguageModelling()
    # They are the validation rows too, so that the epoch that knows them best is kept.
    made = Domain("canary", task, Data([*told * 12, *rows], told, make_rows(20, seed=6)))
    made = with_settings(
        made, lr=0.003, epochs=12, rank=16, batch_size=8, patience=12, retention="none"
    )
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    tokenization = Tokenization(model.tokenizer, 64)

    def nats(texts: Sequence[str], name: str | None) -> list[float]:
        examples = [Example(str(n), "", f"the code is {t}") for n, t in enumerate(texts)]
        with model.using(name):
            return answer_nats(model.base.model, tokenization.encode_all(examples), 0)[0].tolist()

    adapter, base = nats([*planted, *control, *others], "canary"), nats(secrets, None)
    bits = [canaries.exposure(one, adapter[8:]) for one in adapter[:8]]
    assert min(bits[:4]) > 5.5  # of 7.01 at most
    assert np.mean(bits[4:]) < 4
    assert np.mean([canaries.exposure(one, base[8:]) for one in base[:4]]) < 4


# ── Prediction and generation ───────────────────────────────────────────────────────────────────


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
    assert one[0] == rows[0]
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
    with pytest.raises(DataError, match=r"input 1, column 'text'.*columns txt"):
        model.predict([{"text": "a"}, {"txt": "b"}], domain="spam")
    with pytest.raises(DataError, match="only whitespace"):
        model.predict("  ", domain="spam")
    with pytest.raises(UsageError, match="a domain to predict for"):
        model.predict("alpha")
    with pytest.raises(UsageError, match="Did you mean 'spam'"):
        model.predict("alpha", domain="spamm")


def test_predict_agrees_with_evaluate(fitted: Fitted, domain: Domain) -> None:
    model, _ = fitted
    test = domain.data.test
    assert isinstance(test, list)
    said = model.predict([row["text"] for row in test], domain="spam")
    items = [i for i in read_items(model.out / "spam") if i["set"] == "test"]
    for prediction, item in zip(said, items, strict=True):
        assert isinstance(prediction, Prediction)
        assert prediction.probability == pytest.approx(
            item["scores"]["adapter"]["confidence"], abs=1e-5
        )


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


# ── Several adapters ────────────────────────────────────────────────────────────────────────────


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


# ── Rows in memory, and wrong calls ─────────────────────────────────────────────────────────────


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


def test_a_dry_run_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path / "out", tiny_base)
    assert model.fit(declared(make_rows(60)), dry_run=True) is None
    assert not (tmp_path / "out").exists()


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


# ── Private rows ──────────────────────────────────────────────────────────────────────────────────

SECRETS = {"train": "zqtrainhush", "test": "zqtesthush", "group": "zqpatient", "file": "zqfile"}


def secret_rows() -> list[dict[str, Any]]:
    rows = make_rows(80)
    for n, row in enumerate(rows):
        row |= {"patient": f"{SECRETS['group']} {n // 4}", "file": f"{SECRETS['file']}{n}.txt"}
    rows[1]["text"] += " " + SECRETS["train"]
    rows[-1]["text"] += " " + SECRETS["test"]
    return rows


@pytest.mark.parametrize("show_text", [False, True])
def test_no_row_text_is_written_or_printed(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], show_text: bool
) -> None:
    made = declared(secret_rows(), epochs=1)
    made = replace(made, data=replace(made.data, group="patient"), show_text=show_text)
    out = tmp_path / "out"
    model = DomainModel.from_pretrained(tiny_base, out=out, display=Display(), device="cpu")
    model.fit(made)
    model.display.line(str(model.evaluate(made, suite=SUITE)))
    said = "".join(capfd.readouterr())
    assert "Verdict" in said
    written = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert len(written) >= 8  # five of the adapter, the digests' key, the ledger and its head
    for name, secret in SECRETS.items():
        found = [p.name for p, content in written.items() if secret.encode() in content]
        assert found == (["items.jsonl"] if show_text and name in ("train", "test") else []), name
        assert not any(secret in str(p) for p in written)
        assert secret not in said


def test_no_row_text_is_in_a_checkpoint_or_an_error(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_domains.training import gradients

    model = model_in(tmp_path, tiny_base)
    made = declared(secret_rows(), epochs=2)
    calls = 0
    right = gradients.text_nats

    def explode(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return right(*args) * (float("nan") if calls > 5 else 1.0)

    monkeypatch.setattr(gradients, "text_nats", explode)
    with pytest.raises(Exception, match="epoch 2") as caught:
        model.fit(made)
    assert (tmp_path / ".spam.checkpoint").exists()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not any(s.encode() in path.read_bytes() for s in SECRETS.values()), path
    for rows in (
        [*secret_rows(), {"text": SECRETS["train"], "label": None}],
        [*secret_rows(), {"text": None, "label": SECRETS["test"] * 9}],
    ):
        with pytest.raises(DataError) as caught:
            model.fit(rows, name="own")
        assert not any(s in str(caught.value) for s in SECRETS.values())
