"""Trained heads: PEFT is the oracle for saving and loading, and the base stays unchanged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import save, strong
from support.encoders import KINDS, make_encoder
from transformers import AutoModelForSequenceClassification

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import new_adapter
from lora_domains.cli.flags import Parser, add_run_flags, configured
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.data.tokenization import EncodedExample, EncodedRow, Tokenization
from lora_domains.domain import Domain, Lora, with_settings
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterUnsupported,
    UsageError,
)
from lora_domains.evaluation.baselines import BaselineInputs, frozen_features
from lora_domains.evaluation.scorer import Scorer
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.heads import features, head_logits, head_logprobs, head_shapes
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import read_items
from lora_domains.tasks import Classification, Generation, Row
from lora_domains.training import fit
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan

QUIET = Display(quiet=True)
WEIGHTS = "adapter_model.safetensors"
PROMPTS = [(5, 9, 20, 31), (7, 8), (11, 30, 41, 52, 63, 74, 85)]
"""Token ids of prompts of different lengths, so that they are padded."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[[str], Path]:
    """The folder of a random base of each kind."""
    made = {"llama": tiny_base}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_encoder(tmp_path_factory.mktemp("encoders") / kind, kind)
        return made[kind]

    return base


def items() -> list[EncodedExample]:
    return [EncodedExample(str(i), prompt, (), target=i % 2) for i, prompt in enumerate(PROMPTS)]


def padded() -> dict[str, torch.Tensor]:
    """The prompts as input of plain transformers, padded on the right."""
    ids = torch.zeros((len(PROMPTS), 7), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def headed(base: Base, name: str = "headed", classes: int = 3, seed: int = 1) -> Adapter:
    """An adapter with a head, whose effects are far above the tolerance."""
    adapter = new_adapter(base, name, Lora(), 4, 8, seed, classes)
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.normal_(std=0.3, generator=generator)
    assert adapter.head is not None
    for tensor in adapter.head.weights.values():
        tensor.normal_(std=0.5, generator=generator)
    return adapter


def served(base: Base, adapter: Adapter) -> torch.Tensor:
    """(rows, classes): logits of the head of ``adapter``."""
    bank = Bank(base)
    bank.add(adapter)
    assert adapter.head is not None
    with torch.no_grad(), bank.routed(adapter.name):
        return head_logits(adapter.head, features(base.model, items(), 0))


# ── PEFT round trip ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_plain_peft_loads_heads_saved_here(
    tmp_path: Path, bases: Callable[[str], Path], kind: str
) -> None:
    base = load_base(bases(kind), device="cpu")
    adapter = headed(base)
    folder = save(tmp_path / "headed", adapter, base)
    ours = served(base, load_adapter(folder, base))
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert not {"pre_classifier", "bert.pooler.dense", "classifier.dense"} & set(
        stored["target_modules"]
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(bases(kind), num_labels=3)
    with torch.no_grad():
        bare = classifier.eval()(**padded()).logits
        theirs = PeftModel.from_pretrained(classifier, folder).eval()(**padded()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - bare).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_heads_of_plain_peft_load_here(
    tmp_path: Path, bases: Callable[[str], Path], kind: str
) -> None:
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(bases(kind), num_labels=4)
    targets = {"llama": ["q_proj", "down_proj"], "distilbert": ["q_lin", "lin2"]}
    whole = ["pooler"] if kind == "bert" else None
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=targets.get(kind, ["query", "value"]),
        modules_to_save=whole, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(classifier, config).eval()
    with torch.no_grad():
        theirs = model(**padded()).logits
    model.save_pretrained(tmp_path / "peft")
    base = load_base(bases(kind), device="cpu")
    before = base.state_digest()
    adapter = load_adapter(tmp_path / "peft", base)
    torch.testing.assert_close(served(base, adapter), theirs, atol=1e-5, rtol=0)
    assert adapter.head is not None
    assert adapter.head.classes == 4
    assert base.state_digest() == before


@pytest.mark.parametrize("trained", [True, False])
def test_a_pooler_that_peft_left_out_is_taken_from_the_checkpoint_or_refused(
    tmp_path: Path, trained: bool
) -> None:
    """PEFT saves BERT's classifier without its pooler, which may have been random."""
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare" if trained else "masked")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(classifier, config).eval()
    model.save_pretrained(tmp_path / "peft")
    base = load_base(folder, device="cpu")
    if not trained:
        with pytest.raises(AdapterUnsupported, match="random and was not saved"):
            load_adapter(tmp_path / "peft", base)
        return
    with torch.no_grad():
        theirs = model(**padded()).logits
    adapter = load_adapter(tmp_path / "peft", base)
    torch.testing.assert_close(served(base, adapter), theirs, atol=1e-5, rtol=0)


def test_a_new_head_starts_from_the_pooler_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare")
    stored = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    head = new_adapter(load_base(folder, device="cpu"), "x", Lora(), 4, 8, 0, 3).head
    assert head is not None
    assert torch.equal(head.weights["bert.pooler.dense.weight"], stored)
    assert head.weights["classifier.weight"].std() < 0.05


# ── Loading is strict ───────────────────────────────────────────────────────────────────────────


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the stored tensors, and remove the card, whose sha256 would reveal the change."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / "card.json").unlink()


HEAD = "base_model.model.pre_classifier.weight"
LAST = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(LAST), AdapterCorrupt, "a head classifier.weight"),
        (lambda t: t.pop(HEAD), AdapterUnsupported, "pre_classifier.weight"),
        (lambda t: t.update({LAST: torch.ones(3, 31)}), AdapterCorrupt, "(3, 31)"),
        (lambda t: t.update({LAST: torch.ones(1, 32)}), AdapterCorrupt, "(1, 32)"),
        (lambda t: t.update({LAST: torch.ones(10**9, 0)}), AdapterCorrupt, "(1000000000, 0)"),
        (lambda t: t.update({HEAD: torch.ones(8, 32)}), AdapterCorrupt, "other shapes"),
        (lambda t: t.update({LAST: torch.ones(5, 32)}), AdapterCorrupt, "classifier.bias"),
        (lambda t: t[HEAD].__setitem__((0, 0), torch.nan), AdapterCorrupt, "NaN"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(3, 32)}), AdapterCorrupt,
         "1 unexpected"),
    ],
)  # fmt: skip
def test_a_changed_head_is_refused(
    tmp_path: Path, bases: Callable[[str], Path], edit: Any, error: type[Exception], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base), base)
    change(folder, edit)
    with pytest.raises(error) as raised:
        load_adapter(folder, base)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "CAUSAL_LM", "modules_to_save": None}, "task_type SEQ_CLS"),
        ({"task_type": None, "modules_to_save": None}, "task_type SEQ_CLS"),
        ({"modules_to_save": ["embeddings", "classifier"]}, "no saved modules except"),
        ({"modules_to_save": "classifier"}, "no saved modules except"),
        ({"modules_to_save": ["classifier"], "target_modules": ["q_lin", "pre_classifier"]},
         "target modules"),
    ],
)  # fmt: skip
def test_a_config_of_another_head_is_refused(
    tmp_path: Path, bases: Callable[[str], Path], settings: dict[str, Any], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base), base)
    (folder / "card.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(AdapterUnsupported, match=message):
        load_adapter(folder, base)


def test_lora_on_a_layer_of_the_head_is_refused(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "pooler.dense"])
    get_peft_model(classifier, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterUnsupported, match=r"LoRA on bert\.pooler\.dense"):
        load_adapter(tmp_path / "peft", load_base(folder, device="cpu"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "classification", "head": True, "labels": ["a", "b"]}, "2 classes"),
        ({"kind": "classification", "head": False, "labels": ["a", "b", "c"]}, "no head"),
    ],
)
def test_a_head_has_as_many_classes_as_the_card_has_labels(
    tmp_path: Path, bases: Callable[[str], Path], task: dict[str, Any], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base, classes=3), base)
    card = json.loads((folder / "card.json").read_text())
    card["adapters"][0]["settings"] = {"task": task}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(AdapterCorrupt, match=message):
        load_adapter(folder, base)


# ── Several adapters on one base ────────────────────────────────────────────────────────────────


def test_two_heads_of_other_sizes_and_a_language_adapter_on_one_base(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    digest = base.state_digest()
    alone = {n: served(load_base(tiny_base, device="cpu"), headed(base, n, k, seed))
             for n, k, seed in (("two", 2, 1), ("seven", 7, 2))}  # fmt: skip
    bank = Bank(base)
    for adapter in (headed(base, "two", 2, 1), headed(base, "seven", 7, 2), strong(base, "words")):
        bank.add(adapter)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        for _ in range(2):  # there, and back again
            for name in ("two", "words", "seven", None):
                with bank.routed(name):
                    head = bank[name].head if name else None
                    if name == "words":
                        assert head is None
                        words = base.model(input_ids=ids).logits
                    elif name is None:
                        bare = base.model(input_ids=ids).logits
                    else:
                        assert head is not None
                        found = head_logprobs(head, features(base.model, items(), 0))
                        torch.testing.assert_close(
                            found, alone[name].log_softmax(-1), atol=1e-5, rtol=0
                        )
    assert (words - bare).abs().max() > 0.01
    assert base.state_digest() == digest


def test_features_do_not_depend_on_the_batch(bases: Callable[[str], Path]) -> None:
    for kind in ("llama", "bert", "roberta"):
        base = load_base(bases(kind), device="cpu")
        with torch.no_grad():
            together = features(base.model, items(), 0)
            single = torch.cat([features(base.model, [item], 0) for item in items()])
        torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
        assert (single[0] - single[1]).abs().max() > 1e-3


def test_a_head_reads_the_text_without_an_answer(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    task = Classification(head=True, labels=("ham", "spam"))
    assert task.template == "{text}"
    assert Classification(("a", "b"), head=True).template == "a: {a}\nb: {b}"
    assert Classification(prompt="{text} is", head=True).template == "{text} is"
    example = task.example(Row({"text": "alpha beta", "label": "spam"}, "train", 0, "row 0"))
    item = Tokenization(base.tokenizer, 16, head=True).encode(example)
    assert (item.answer, item.choices, item.target, item.supervised) == ((), (), 1, 1)
    assert base.tokenizer.decode(item.prompt) == "<s>alpha beta"
    long = replace(example, prompt="alpha " * 40)
    assert len(Tokenization(base.tokenizer, 16, head=True).encode(long)) == 16


# ── Training ────────────────────────────────────────────────────────────────────────────────────


def domain(name: str = "spam", classes: int = 2, **settings: Any) -> Domain:
    rows = make_rows(160)
    if classes > 2:
        words = ("red", "green", "blue", "stone", "river")[:classes]
        rows = [{"text": f"{row['text']} {words[i % classes]}", "label": words[i % classes]}
                for i, row in enumerate(rows)]  # fmt: skip
    data = Data(rows[:100], rows[100:130], rows[130:])
    defaults = {"epochs": 2, "lr": 0.01, "batch_size": 16, "rank": 4, "general_rows": 2}
    task = Classification(head=True)
    return with_settings(Domain(name, task, data), **(defaults | settings))


@pytest.mark.slow
def test_heads_are_trained_evaluated_and_used_beside_a_generator(
    tmp_path: Path, tiny_base: Path
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    digest = model.base.state_digest()
    card = model.fit(domain(epochs=6))
    model.fit(domain("colours", 5, epochs=6))
    answers = [{"question": row["text"], "answer": row["label"]} for row in make_rows(60)]
    model.fit(
        with_settings(
            Domain("words", Generation(), Data(answers)), epochs=1, retention="none", rank=4
        )
    )
    assert model.domains == ("spam", "colours", "words")
    assert model.base.state_digest() == digest
    texts = ["alpha red blue", "beta red blue"]
    said = model.predict(texts, domain="spam")
    assert [set(p.probabilities) for p in said] == [{"ham", "spam"}] * 2  # type: ignore[union-attr]
    (colour,) = model.predict("alpha gamma stone", domain="colours")
    assert sum(colour.probabilities.values()) == pytest.approx(1)  # type: ignore[union-attr]
    assert len(colour.probabilities) == 5  # type: ignore[union-attr]
    assert isinstance(model.generate("red", "words", max_new_tokens=2), str)
    entry = model.evaluate("colours").entry
    scores = entry.domain_scores["macro_f1"]
    assert set(scores["baselines"]) == {"majority", "tfidf"}
    assert scores["adapter"] > 0.9
    assert entry.domain_scores["accuracy"]["base"] > scores["baselines"]["majority"]
    assert {gate["name"] for gate in entry.gates} >= {"gain", "retention", "drift", "effect"}
    assert entry.judged["knowledge"] == "questions"
    assert entry.general["kl"]["general"] > 0
    assert not entry.judged["base_changed"]
    # The adapter alone on a new base gives the same predictions.
    fresh = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    assert fresh.predict(texts, fresh.load_adapter("spam")) == said
    assert card.adapter.task["head"] is True
    readme = (tmp_path / "colours" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)" in readme
    assert "pipeline_tag: text-classification" in readme


@pytest.mark.slow
def test_the_head_of_the_best_epoch_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    dataset = model.dataset(domain(epochs=2, retention="none"))
    run = fit.make_run(model.bank, dataset, make_plan(model.base, dataset), model.out, QUIET)
    seen: list[dict[str, torch.Tensor]] = []

    def worse_and_worse() -> dict[str, Any]:
        seen.append(run._head_weights())
        return {"validation_loss": float(len(seen)), "accuracy": 0.5, "score": -len(seen),
                "higher_is_better": True}  # fmt: skip

    run.validation.figures = worse_and_worse  # type: ignore[method-assign]
    head = run.fit().adapter.head
    assert head is not None
    assert torch.equal(head.weights["score.weight"], seen[0]["score.weight"])
    assert not torch.equal(seen[0]["score.weight"], seen[1]["score.weight"])


def test_the_base_is_scored_by_a_classifier_on_its_features(
    tmp_path: Path, tiny_base: Path
) -> None:
    """It is fitted on training rows and does not depend on loaded adapters; scikit-learn agrees."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    dataset = model.dataset(domain("colours", 5))
    test = [row.encoded for row in dataset.test]

    def scores(**changes: Any) -> list[dict[str, float]]:
        scorer = Scorer(model.bank, QUIET)
        found = frozen_features(BaselineInputs(scorer, replace(dataset, **changes), dataset.test))
        assert found is not None
        return found

    alone = scores()
    model.bank.add(headed(model.base, "colours", 5))
    with model.bank.routed("colours"):
        assert scores() == alone
    right = [s["prediction"] == item.target for s, item in zip(alone, test, strict=True)]
    assert sum(right) / len(right) > 0.5  # five classes
    shuffled = [
        EncodedRow(replace(row.example, target=(row.example.target * 3 + i) % 5), row.encoded)
        for i, row in enumerate(dataset.train)
    ]
    lost = [s["prediction"] == i.target for s, i in zip(scores(train=shuffled), test, strict=True)]
    assert sum(lost) < sum(right)
    assert all(s["nll"] > 0 and 0 <= s["brier"] <= 2 for s in alone)


@pytest.mark.slow
def test_a_head_keeps_the_labels_it_was_trained_on(tmp_path: Path, tiny_base: Path) -> None:
    """Fitted, then evaluated with another domain of the same name."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    declared = domain(epochs=1, retention="none")
    model.fit(declared)
    before = model.predict("alpha red", "spam")
    for task in (Classification(), Classification(head=True, labels=("spam", "ham")),
                 Classification(head=True, labels=("eggs", "ham", "spam"))):  # fmt: skip
        fresh = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
        with pytest.raises(AdapterError, match="one over ham, spam"):
            fresh.evaluate(replace(declared, task=task))
        assert fresh.predict("alpha red", "spam") == before


def test_a_second_stage_keeps_the_classes_of_its_head(tmp_path: Path, tiny_base: Path) -> None:
    """The new rows lack one label; other labels, or no head, are refused before training."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    wide = domain("wide", classes=3, epochs=1, retention="none")
    model.fit(wide)
    data = wide.data
    narrow = Data(*([row for row in part if row["label"] != "red"]  # type: ignore[union-attr]
                    for part in (data.train, data.validation, data.test)))  # fmt: skip
    card = model.fit(replace(wide, name="narrow", data=narrow), init_from="wide")
    assert card.adapter.task["labels"] == ["blue", "green", "red"]
    head = model.bank["narrow"].head
    assert head is not None
    assert head.classes == 3
    fresh = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    entry = fresh.evaluate(replace(wide, name="narrow", data=narrow)).entry
    assert entry.judged["labels"] == ["blue", "green", "red"]
    targets = {item["target"] for item in read_items(tmp_path / "narrow") if item["set"] == "test"}
    assert targets == {0, 1}
    for task in (Classification(), Classification(head=True, labels=("blue", "green"))):
        with pytest.raises(AdapterError, match=r"wide, to continue from"):
            model.fit(replace(wide, name="other", task=task), init_from="wide")
    model.fit(replace(wide, name="plain", task=Classification()), rank=4)
    with pytest.raises(AdapterError, match="an adapter without one"):
        model.fit(replace(wide, name="other"), init_from="plain")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_drift_beyond_the_limit_is_reported_for_a_head(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=Display(), device="cpu")
    model.fit(domain(epochs=1, lr=0.05, drift=1e-9))
    assert "no epoch stays within the drift limit of 1e-09" in capsys.readouterr().out


def test_a_classifier_of_plain_peft_has_no_labels(tmp_path: Path, tiny_base: Path) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    folder = save(tmp_path / "headed", headed(model.base), model.base)
    (folder / "card.json").unlink()
    model.load_adapter(folder)
    with pytest.raises(UsageError, match="Its labels are not in its folder"):
        model.predict("alpha", "headed")


def test_the_flag_for_a_head() -> None:
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read(["--head", "--label", "kind"])
    headed = configured(Domain("x", Classification(), Data([])), flags)
    assert headed.task == Classification(label="kind", head=True)
    assert configured(headed, parser.read([])).task == headed.task  # a recipe's own stays
    with pytest.raises(UsageError, match="--head"):
        configured(Domain("x", Generation(), Data([])), parser.read(["--head"]))
    assert headed.digest() != replace(headed, task=Classification(label="kind")).digest()


@pytest.mark.slow
def test_a_head_resumes_exactly(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = domain(dropout=0.1)
    whole = DomainModel.from_pretrained(tiny_base, out=tmp_path / "a", display=QUIET, device="cpu")
    whole.fit(declared)
    step, steps = Run.train_step, 0

    def dying(run: Run, batch: Any) -> None:
        nonlocal steps
        step(run, batch)
        steps += 1
        run.save()
        if steps == 10:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", dying)
    other = DomainModel.from_pretrained(tiny_base, out=tmp_path / "b", display=QUIET, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        other.fit(declared)
    monkeypatch.setattr(Run, "train_step", step)
    again = DomainModel.from_pretrained(tiny_base, out=tmp_path / "b", display=QUIET, device="cpu")
    again.fit(declared, resume=True)
    files = [(tmp_path / part / "spam" / WEIGHTS).read_bytes() for part in "ab"]
    assert files[0] == files[1]
    assert "base_model.model.score.weight" in load_file(tmp_path / "a" / "spam" / WEIGHTS)


def test_a_head_of_another_size_leaves_the_bank_unchanged(tmp_path: Path, tiny_base: Path) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    folder = save(tmp_path / "headed", headed(model.base), model.base)
    assert model.load_adapter(folder) == "headed"
    shutil.copytree(folder, tmp_path / "broken")
    change(
        tmp_path / "broken", lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 9)})
    )
    with pytest.raises(AdapterError):
        model.load_adapter("broken")
    assert model.domains == ("headed",)
    assert head_shapes(model.base, 3) == {"score.weight": (3, 32)}
