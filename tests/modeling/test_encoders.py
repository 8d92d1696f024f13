"""Encoders as a base: loading with and without a masked-token head, training, evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import run, write
from support.encoders import KINDS, config_of, make_encoder, make_tokenizer
from support.heads import headed
from support.models import model_in
from transformers import LlamaConfig

from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import BaseModelError, UsageError
from lora_domains.inference.likelihoods import answer_nats, tail_logits
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.base_check import ENCODERS, FROM_PADDING, is_bidirectional
from lora_domains.modeling.batching import IGNORED, collate
from lora_domains.modeling.heads import LAYOUTS
from lora_domains.probes.features import feature_sets
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.stats.comparisons import compare_means
from lora_domains.tasks import (
    Classification,
    Example,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Task,
)
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.rules import not_applicable, verdict
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.side_effects import judge_retention, masked_retention
from lora_domains.verdict.summary import summarise

TOKENIZER = make_tokenizer()


# ── Loading ─────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_encoder_has_a_head_and_is_tested() -> None:
    assert set(ENCODERS) == set(LAYOUTS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_loaded_with_its_masked_token_head(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForMaskedLM

    folder = make_encoder(tmp_path / kind, kind)
    base = load_base(folder, device="cpu")
    assert base.bidirectional
    assert base.language_head
    assert base.width == 32
    assert base.context == {"mpnet": 62}.get(kind, 63 if kind in FROM_PADDING else 64)
    assert not any(p.requires_grad for p in base.model.parameters())
    ids = torch.tensor([[2, 9, 11, 4, 3]])
    with torch.no_grad():
        wanted = AutoModelForMaskedLM.from_pretrained(folder).eval()(ids).logits
        assert torch.equal(base.model(input_ids=ids).logits, wanted)
        assert base.model(input_ids=torch.full((1, base.context), 9)).logits.isfinite().all()


@pytest.mark.parametrize("saved", ["bare", "classifier"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_masked_token_head_is_never_used(tmp_path: Path, kind: str, saved: str) -> None:
    folder = make_encoder(tmp_path / kind, kind, saved=saved)
    base = load_base(folder, device="cpu")
    assert base.bidirectional
    assert not base.language_head
    with pytest.raises(BaseModelError, match="trained masked-token head"):
        base.model(input_ids=torch.tensor([[2, 9, 3]]))
    again = load_base(folder, device="cpu")
    assert (base.identity, base.state_digest()) == (again.identity, again.state_digest())


def test_tensors_that_the_model_lacks_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    bare = load_base(make_encoder(tmp_path / "bare", "bert", saved="bare"), device="cpu")
    whole = load_base(make_encoder(tmp_path / "whole", "bert", saved="classifier"), device="cpu")
    for base in (bare, whole):
        found = base.stored_tensor("bert.pooler.dense.weight")
        assert found is not None
        assert found.shape == (32, 32)
    assert bare.stored_tensor("classifier.weight") is None
    assert whole.stored_tensor("classifier.weight") is not None


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "bert", "bert")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="weights for the whole model"):
        load_base(folder, device="cpu")


def test_a_tokenizer_without_encoder_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = make_encoder(tmp_path / "bert", "bert")
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    bare.save_pretrained(folder)
    with pytest.raises(BaseModelError, match=r"\[CLS\]"):
        load_base(folder, device="cpu")


def test_a_bert_that_is_a_decoder_is_a_causal_base(tmp_path: Path) -> None:
    config = config_of("bert")
    assert is_bidirectional(config)
    config.is_decoder = True
    assert not is_bidirectional(config)
    assert not is_bidirectional(LlamaConfig())


def test_rows_of_a_base_with_shared_positions_are_served_domain_by_domain(tmp_path: Path) -> None:
    """DeBERTa's linears read embeddings of relative positions, which are those of no row."""
    base = load_base(make_encoder(tmp_path / "base", "deberta-v2"), device="cpu")
    bank = Bank(base)
    for seed, name in enumerate("ab"):
        bank.add(headed(base, name, seed=seed))
    assert bank.parts(["a", "b", None, "a"]) == [[0, 3], [1], [2]]
    with pytest.raises(UsageError, match=r"one domain in each call .* found 2 domains"):
        bank.route(["a", "b"])
    assert bank.route(["a", "a"]) is not None


# ── Tokens ──────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["alpha", "beta", "red", "win", "xyzzy"]), max_size=30),
       st.integers(8, 40))  # fmt: skip
def test_only_the_predicted_tokens_are_masked(words: list[str], limit: int) -> None:
    tokenization = Tokenization(TOKENIZER, limit, bidirectional=True)
    ids = tokenization.tokens(" ".join(words))
    items = tokenization.windows(Example("text:1", "", " ".join(words)))
    restored: list[int] = []
    for item in items:
        assert len(item) == len(item.prompt) <= limit
        assert (item.prompt[0], item.prompt[-1]) == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id)
        prompt = list(item.prompt)
        assert len(item.answer) == len(item.masked) == max(1, round(0.15 * (len(prompt) - 2)))
        for place, token in zip(item.masked, item.answer, strict=True):
            assert prompt[place] == TOKENIZER.mask_token_id
            prompt[place] = token
        restored += prompt[1:-1]
    assert restored == ids
    assert items == tokenization.windows(Example("text:1", "", " ".join(words)))


def test_an_encoders_text_has_its_special_tokens_and_is_cut_in_the_middle() -> None:
    example = Example("1", "red green blue stone river cloud note", " ham", target=0)
    whole = Tokenization(TOKENIZER, 32, head=True, bidirectional=True).encode(example)
    assert TOKENIZER.decode(whole.prompt) == "[CLS] red green blue stone river cloud note [SEP]"
    cut = Tokenization(TOKENIZER, 6, head=True, bidirectional=True).encode(example)
    assert TOKENIZER.decode(cut.prompt) == "[CLS] red green cloud note [SEP]"
    assert cut.truncated


def test_nats_of_masked_tokens_come_from_the_masked_head(tmp_path: Path) -> None:
    """Compared with plain transformers, text by text without padding."""
    base = load_base(make_encoder(tmp_path / "bert", "bert"), device="cpu")
    tokenization = Tokenization(base.tokenizer, 24, bidirectional=True)
    texts = ["red green blue", "stone river cloud note alpha beta gamma " * 3, "win prize"]
    items = [i for n, t in enumerate(texts) for i in tokenization.windows(Example(f"t:{n}", "", t))]
    nats, tokens = answer_nats(base.model, items, 0)
    for item, found, count in zip(items, nats, tokens, strict=True):
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([item.prompt])).logits[0]
        wanted = F.cross_entropy(
            logits[list(item.masked)], torch.tensor(item.answer), reduction="sum"
        )
        assert found == pytest.approx(float(wanted), abs=1e-4)
        assert count == len(item.answer)
    batch = collate(items, 0)
    assert tail_logits(base.model, batch).shape[:2] == batch.labels.shape
    assert int((batch.labels != IGNORED).sum()) == sum(len(item.answer) for item in items)


# ── Unsupported tasks ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "task", [Classification(), MultipleChoice(), Generation(), LanguageModelling()]
)
def test_tasks_that_need_a_causal_model_are_refused(tmp_path: Path, task: Task) -> None:
    model = model_in(tmp_path / "out", make_encoder(tmp_path / "base"))
    with pytest.raises(UsageError, match=r"head=True\) or give --head"):
        model.fit(Domain("x", task, Data(make_rows(20))))
    with pytest.raises(UsageError, match="to generate text"):
        model.generate("red")


# ── Gates ───────────────────────────────────────────────────────────────────────────────────────


def test_retention_of_an_encoder_is_the_rise_of_its_nats() -> None:
    random = np.random.default_rng(0)
    base = random.uniform(1.5, 2.5, 300)
    for rise, wanted in ((0.0, "pass"), (0.03, "pass"), (0.2, "fail")):
        moved = base + rise + random.normal(0, 0.05, 300)
        gate = masked_retention(compare_means(base, moved, None, False), 0.03)
        assert gate.verdict == wanted
        assert gate.threshold == pytest.approx(0.03 * base.mean())
        assert "a rise of 3 % is allowed" in gate.why
    few = masked_retention(compare_means(base[:6], base[:6] + [0.3, -0.3] * 3, None, False), 0.03)
    assert few.verdict == "inconclusive"


def masked_texts(before: np.ndarray, after: np.ndarray) -> Evidence:
    """Texts of ten masked tokens, with these nats for each."""
    items = [{"set": "text", "id": f"text:{i}", "scores": {
        who: {"nats": 10 * nats, "tokens": 10} for who, nats in (("base", b), ("adapter", a))
    }} for i, (b, a) in enumerate(zip(before, after, strict=True))]  # fmt: skip
    return Evidence(ScoreTable(items), METRICS["accuracy"], knowledge="masked tokens")


@pytest.mark.parametrize("alike", [True, False])
def test_a_rise_at_the_margin_of_other_texts_rarely_passes(alike: bool) -> None:
    """A rise of 3 % of the nats of all texts, of which the gate sees a few hundred.

    Where the rise is ``alike`` on every text, only what the margin is taken from varies.
    """
    random, share, passed = np.random.default_rng(0), 0.03, 0
    for _ in range(400):
        before = random.gamma(4, 0.5, 300)  # 2 nats on average
        rise = share * 2.0 if alike else share * before * random.gamma(1, 1, 300)
        found = judge_retention(masked_texts(before, before + rise), share)
        assert found is not None
        passed += found.verdict == "pass"
        assert found.threshold == pytest.approx(share * before.mean())
    assert passed <= 400 * 0.05 + 3 * np.sqrt(400 * 0.05 * 0.95)


def test_a_gate_that_is_not_applicable_does_not_decide() -> None:
    absent = not_applicable("retention", "kept", 0.03, "there is no head")
    same = np.ones(500)
    good = masked_retention(compare_means(same, same, None, False), 0.03)
    assert good.verdict == "pass"
    assert verdict([absent, good]) == "pass"
    assert verdict([absent]) == "inconclusive"


def test_missing_general_figures_are_reported() -> None:
    """Both gates are in the card, and neither passes silently."""
    scores = {"prediction": 1, "nll": 0.1, "confidence": 0.9, "brier": 0.02}
    wrong = {"prediction": 0, "nll": 2.0, "confidence": 0.9, "brier": 1.6}
    items = [{"set": "test", "id": f"test:{i}", "target": i % 2,
              "scores": {"base": wrong if i % 2 else scores, "adapter": scores if i % 2 else wrong}}
             for i in range(20)]  # fmt: skip
    evidence = Evidence(
        ScoreTable(items), METRICS["macro_f1"], ["a", "b"], leaks={"exact": 0, "near": 0},
        largest_move=1.0, knowledge="nothing",
    )  # fmt: skip
    made = summarise(evidence, {})
    found = {gate["name"]: gate["verdict"] for gate in made["gates"]}
    assert found["retention"] == found["drift"] == "not applicable"
    assert made["general"] == {}


# ── The tutorial's experiment ───────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["masked", pytest.param("bare", marks=pytest.mark.long)])
def test_the_experiment_of_the_tutorial(
    tmp_path: Path, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to a verdict, with a DistilBERT and a head."""
    rows, out = make_rows(260), tmp_path / "adapters"
    place = ("--base", str(make_encoder(tmp_path / "distilbert", saved=saved)), "--out", str(out))
    code = run(
        "fit", "--name", "tutorial", "--head", *place, "--epochs", "8", "--lr", "5e-3",
        "--rank", "8", "--train", write(tmp_path / "train.csv", rows[:160]),
        "--validation", write(tmp_path / "validation.csv", rows[160:200]),
        "--test", write(tmp_path / "test.csv", rows[200:]),
    )  # fmt: skip
    output = capsys.readouterr().out
    assert code in (0, 1, 3), output
    entry = Card.read(out / "tutorial").adapter
    scores = entry.domain_scores["accuracy"]
    gates = {gate["name"]: gate for gate in entry.gates}
    assert scores["adapter"] >= 0.9
    # A classifier on frozen features may already separate these few words.
    assert scores["adapter"] >= scores["base"] > 0.3
    assert scores["adapter"] > scores["baselines"]["majority"]
    assert set(scores["baselines"]) == {"majority", "tfidf"}
    assert gates["frozen"]["verdict"] == gates["effect"]["verdict"] == "pass"
    if saved == "masked":
        assert entry.judged["knowledge"] == "masked tokens"
        kept = gates["retention"]
        nats = entry.general["nats"]
        assert kept["observed"] == pytest.approx(nats["adapter"] - nats["base"])
        assert kept["threshold"] == pytest.approx(0.03 * nats["base"])
        assert entry.general["kl"]["general"] > 0
        assert "nats per masked token" in output
    else:
        assert entry.judged["knowledge"] == "features"
        # Judged by all of them, or by the one that clearly lost most: rounding decides here.
        kept = gates["retention"]
        (judged,) = [
            name for name, figures in entry.general.items()
            if kept["observed"] == pytest.approx(figures["adapter"] - figures["base"])
            and (name in kept["why"] or name == "pooled")
        ]  # fmt: skip
        assert judged == "pooled" or kept["verdict"] == "fail"
        assert "features" in kept["rule"] + kept["why"]
        assert {f"features/{one.name}" for one in feature_sets()} < entry.general.keys()
        assert "features/number" in output
        assert gates["drift"]["verdict"] == "not applicable"
        assert "the adapter is not regularised towards it" in output
        assert "– not applicable" in output
    assert rebuild(out / "tutorial").adapter.gates == entry.gates
    assert run("predict", "tutorial", "alpha red", "beta red", *place) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["spam", "ham"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_training_leaves_other_encoders_unchanged(tmp_path: Path, kind: str) -> None:
    model = model_in(tmp_path / "out", make_encoder(tmp_path / kind, kind))
    digest = model.base.state_digest()
    declared = Domain("spam", Classification(head=True), Data(make_rows(120)))
    model.fit(with_settings(declared, epochs=3, lr=5e-3, rank=4, dropout=0.1))
    entry = model.evaluate("spam").entry
    assert model.base.state_digest() == digest
    assert entry.judged["base_changed"] is False
    assert {gate["name"]: gate["verdict"] for gate in entry.gates}["effect"] == "pass"
    (found,) = model.predict("alpha red", "spam")
    assert sum(found.probabilities.values()) == pytest.approx(1)  # type: ignore[union-attr]
