"""Scale curves: 0 is the base, 1 the adapter, and no row of a gate is read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import PeftModel
from support import folders
from support.adapters import logits, save, strong, token_ids
from support.commands import run
from support.heads import headed
from support.models import SUITE, use_small_suite
from transformers import AutoModelForCausalLM

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.versions import versions
from lora_domains.analysis.scale_curve import (
    apply_scale,
    best_scale,
    check_adapter,
    check_scales,
    check_validation,
    chosen,
    curve,
    least_scale,
    scaled,
)
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import AdapterError, DataError, UsageError
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.probes.general_text import embedded_texts, general_text
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.report.conclusion import conclusion
from lora_domains.tasks import Classification

ROWS = make_rows(90)
DOMAIN = with_settings(
    Domain("spam", Classification(positive="spam"), Data(ROWS[:40], ROWS[40:70], ROWS[70:])),
    epochs=2, retention="none", rank=4, lr=0.02, batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> DomainModel:
    """A model with the adapter ``spam``, trained on files that hold the rows of DOMAIN."""
    out = tmp_path_factory.mktemp("adapters")
    files = []
    for name, rows in (("train", ROWS[:40]), ("validation", ROWS[40:70]), ("test", ROWS[70:])):
        files.append(out / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = DomainModel.from_pretrained(
        tiny_base, out=out, display=Display(quiet=True), device="cpu"
    )
    filed = replace(DOMAIN, data=Data(*map(str, files)))
    model.fit(filed)
    model.evaluate(filed, suite=SUITE)
    return model


def test_scale_0_is_the_base_and_1_the_adapter(tiny_base: Path) -> None:
    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base))
    with scaled(bank, "strong", (0.0, 0.5, 1.0)) as names:
        half = logits(bank, names[0.5])
        assert torch.equal(logits(bank, names[0.0]), logits(bank))
        assert torch.equal(logits(bank, names[1.0]), logits(bank, "strong"))
        for end in (logits(bank), logits(bank, "strong")):
            assert (half - end).abs().max() > 1e-2
    assert tuple(bank) == ("strong",)


def test_copies_are_removed_after_an_error(tiny_base: Path) -> None:
    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base))
    with pytest.raises(RuntimeError), scaled(bank, "strong", (0.0, 1.0)):
        raise RuntimeError
    assert tuple(bank) == ("strong",)


@pytest.mark.slow
def test_the_ends_of_the_curve_are_base_and_adapter(trained: DomainModel) -> None:
    found = curve(trained, "spam", DOMAIN, (1.0, 0.0, 0.5))
    points = {point["scale"]: point for point in found["points"]}
    assert list(points) == [0.0, 0.5, 1.0]
    assert points[0.0]["score"] == found["base"]["score"]
    assert points[0.0]["nats"] == found["base"]["nats"]
    assert points[0.0]["kl"] == 0 < points[0.5]["kl"] < points[1.0]["kl"]
    # The validation score of the epoch that was kept, measured when it was trained.
    training = trained.bank["spam"].card.adapter.training  # type: ignore[union-attr]
    kept = training["history"][training["best_epoch"] - 1]["score"]
    assert points[1.0]["score"] == pytest.approx(kept)
    assert points[1.0]["difference"] == pytest.approx(kept - found["base"]["score"])
    assert found["rows"] == 30


@pytest.mark.slow
def test_the_curve_is_written_into_the_card(trained: DomainModel) -> None:
    folder = trained.out / "spam"
    items = (folder / "items.jsonl").read_text()
    before = json.loads((folder / "card.json").read_text())["adapters"][0]
    found = curve(trained, "spam", DOMAIN, (0.0, 1.0))
    after = json.loads((folder / "card.json").read_text())["adapters"][0]
    assert after.pop("scale_curve") == found
    before.pop("scale_curve", None)
    assert after == before
    assert (folder / "items.jsonl").read_text() == items
    assert ROWS[45]["text"] not in json.dumps(found)
    trained.load_adapter(folder)  # its card is still valid


@pytest.mark.slow
def test_no_row_of_a_gate_is_read(trained: DomainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def remembers(_: Scorer, part: Part, contenders: object) -> None:
        read.extend(row.example.id.split(":")[0] for row in part.rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "scores", remembers)
    with pytest.raises(KeyboardInterrupt):
        curve(trained, "spam", DOMAIN)
    assert set(read) == {"validation"}
    measured = set(embedded_texts("test"))
    assert not measured & {example.answer for example in general_text(None).selection}


@pytest.mark.slow
def test_other_validation_rows_are_refused(trained: DomainModel) -> None:
    other = replace(DOMAIN, name="other", data=replace(DOMAIN.data, validation=ROWS[41:70]))
    with pytest.raises(UsageError, match="the validation rows of its training"):
        curve(trained, "spam", other)


@pytest.mark.slow
def test_rows_cut_at_another_length_are_refused(trained: DomainModel) -> None:
    with pytest.raises(UsageError, match="at most 64"):
        curve(trained, "spam", with_settings(DOMAIN, max_length=64))


@pytest.mark.parametrize("scales", [(), (1.0,), (1.0, 1.0), (0.0, -1.0), (0.0, 5.0)])
def test_scales_that_make_no_curve_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="at least two scales"):
        check_scales(scales)


@pytest.mark.slow
def test_an_adapter_without_a_card_is_refused(trained: DomainModel) -> None:
    trained.bank.add(strong(trained.base))
    with pytest.raises(AdapterError, match="plain PEFT"):
        curve(trained, "strong", DOMAIN)
    trained.unload("strong")


def test_validation_rows_are_required() -> None:
    with pytest.raises(DataError, match="not chosen on the rows of a gate"):
        check_validation([])


def test_of_equal_scales_the_nearest_to_the_base_is_best() -> None:
    points = [
        {"scale": 0.5, "score": 0.9, "kl": 0.1},
        {"scale": 1.0, "score": 0.9, "kl": 0.3},
        {"scale": 0.0, "score": 0.4, "kl": 0.0},
    ]
    assert best_scale("f1", points) == 0.5
    assert best_scale("nats_per_token", points) == 0.0


def test_the_least_scale_is_the_smallest_shown_to_lose_little() -> None:
    def row(at: int) -> dict[str, object]:
        said = {"none": 1 - at % 2, "half": at % 2 if at else 1, "whole": at % 2}
        return {"target": at % 2, "group": None,
                "scores": {name: {"prediction": p} for name, p in said.items()}}  # fmt: skip

    scored = [row(at) for at in range(400)]
    names = {0.0: "none", 0.5: "half", 1.0: "whole"}
    assert least_scale("accuracy", scored, names, None) == 0.5
    assert least_scale("accuracy", scored, {0.0: "none", 1.0: "whole"}, None) == 1.0
    assert least_scale("accuracy", scored, {0.5: "half"}, None) is None
    # Forty rows are too few to show it.
    assert least_scale("accuracy", scored[:40], names, None) == 1.0


@pytest.mark.slow
def test_the_command_shows_the_curve(
    trained: DomainModel,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The rows named in its card (by file name), then the same rows as arguments.
    monkeypatch.chdir(trained.out)
    common = ["--scales", "0,1", "--out", ".", "--base", str(tiny_base)]
    rows = ["train.jsonl", "--validation", "validation.jsonl", "--test", "test.jsonl"]
    for given in ([], rows):
        assert run("curve", "spam", *given, *common) == 0
        output = capsys.readouterr().out
        assert "F1 on 30 validation rows" in output
        assert "Best on these rows" in output


@pytest.mark.slow
def test_the_command_keeps_the_row_length_of_the_training(
    trained: DomainModel, tiny_base: Path
) -> None:
    files = [str(trained.out / f"{name}.jsonl") for name in ("train", "validation", "test")]
    short = replace(with_settings(DOMAIN, max_length=24, epochs=1), name="short", data=Data(*files))
    trained.fit(short)
    rows = [files[0], "--validation", files[1], "--test", files[2]]
    common = ["--scales", "0,1", "--out", str(trained.out), "--base", str(tiny_base)]
    assert run("curve", "short", *rows, *common) == 0


# ── Applying a scale ────────────────────────────────────────────────────────────────────────────

CURVE = {
    "metric": "f1", "rows": 30, "texts": 8, "base": {"score": 0.4, "nats": 2.0}, "best": 0.5,
    "loss": 0.03, "least": 0.5,
    "points": [
        {"scale": scale, "score": score, "difference": 0.1, "lower": 0.0, "upper": 0.2,
         "nats": 2.0, "kl": scale}
        for scale, score in ((0.0, 0.4), (0.5, 0.9), (1.0, 0.8), (0.3, 0.7))
    ],
}  # fmt: skip
"""A curve in which 0.5 is best."""


def measured(folder: Path, base: Base, **lora: Any) -> Path:
    """An adapter with an effect, a verdict and a curve, and patterns of rank and alpha."""
    adapter = strong(base, folder.name)
    adapter.config.alpha_pattern = lora.get("alphas", {})
    adapter.config.use_rslora = lora.get("rslora", False)
    save(folder, adapter, base)
    card = Card.read(folder)
    made = folders.CARD["adapters"][0]
    known = {key: made[key] for key in ("settings", "training", "ledger", "leaks", "judged")}
    card.adapter = replace(card.adapter, scale_curve=CURVE, verdict="pass", **known)
    card.write(folder)
    (folder / "items.jsonl").write_text('{"set": "validation"}\n')
    return folder


@pytest.mark.parametrize(
    "lora",
    [{}, {"rslora": True}, {"alphas": {"q_proj": 3, "mlp.up_proj": 20}}],
    ids=["plain", "rslora", "alpha pattern"],
)
def test_a_scale_is_what_peft_reads(tiny_base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    base = load_base(tiny_base, device="cpu")
    folder = measured(tmp_path / "triage", base, **lora)
    before, trained = fingerprint(folder), (folder / "adapter_config.json").read_bytes()
    bank = Bank(base)
    bank.add(load_adapter(folder, base))
    with scaled(bank, "triage", (0.5, 1.0)) as names:
        wanted, whole = logits(bank, names[0.5]), logits(bank, names[1.0])
    assert (wanted - whole).abs().max() > 1e-2
    card, saved = apply_scale(folder, "best")
    assert (card.adapter.scale, saved and saved.name) == (0.5, "0001")
    bank.add(load_adapter(folder, base))
    torch.testing.assert_close(logits(bank, "triage"), wanted, atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, folder).eval()(input_ids=token_ids()).logits
    torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=0)
    # Scales stay relative to the training, and 1 is what was trained, to the byte.
    with scaled(bank, "triage", (1.0,)) as names:
        torch.testing.assert_close(logits(bank, names[1.0]), whole, atol=1e-5, rtol=0)
    apply_scale(folder, 0.3)
    apply_scale(folder, 1.0)
    assert (folder / "adapter_config.json").read_bytes() == trained
    assert fingerprint(folder) == before
    assert Card.read(folder).adapter.scale == 1.0


def test_a_verdict_does_not_hold_at_another_scale(tiny_base: Path, tmp_path: Path) -> None:
    folder = measured(tmp_path / "triage", load_base(tiny_base, device="cpu"))
    card, _ = apply_scale(folder, 0.5)
    assert card == Card.read(folder)
    entry = card.adapter
    assert (entry.verdict, entry.judged, entry.gates) == (None, {}, [])
    assert entry.scale_curve == CURVE
    assert (folder / "items.jsonl").read_text() == ""
    words = "not been evaluated at this scale (0.5 of its trained effect)"
    assert words in conclusion(entry)
    assert words in (folder / "README.md").read_text()
    assert "0.5 times the trained one" in (folder / "README.md").read_text()
    assert Card.read(tmp_path / ".versions" / "triage" / "0001").adapter.verdict == "pass"
    assert apply_scale(folder, 0.5) == (card, None)
    assert [path.name for path in versions(folder)] == ["0001"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(0.7, "measured on validation rows; found 0.7"), (0.0, "above 0"), (5.0, "at most 4"),
     (float("nan"), "above 0"), ("worst", "found worst")],
)  # fmt: skip
def test_a_scale_that_was_not_measured_is_refused(
    tiny_base: Path, tmp_path: Path, wanted: float | str, message: str
) -> None:
    folder = measured(tmp_path / "triage", load_base(tiny_base, device="cpu"))
    before = fingerprint(folder)
    with pytest.raises(UsageError, match=message):
        apply_scale(folder, wanted)
    assert fingerprint(folder) == before


def test_the_base_is_never_the_best_scale_to_apply() -> None:
    points = [{"scale": 0.0, "score": 0.9, "kl": 0.0}, {"scale": 0.5, "score": 0.8, "kl": 0.1}]
    assert chosen({"metric": "f1", "points": points}, "best") == 0.5


@pytest.mark.parametrize("kind", ["dora", "head"])
def test_an_adapter_that_has_no_scale_is_refused(tiny_base: Path, kind: str) -> None:
    base = load_base(tiny_base, device="cpu")
    adapter = headed(base) if kind == "head" else strong(base, dora=True)
    entry = AdapterEntry(domain="x", path="x", sha256="0")
    adapter.card = Card(base=BaseRecord(**base.record()), adapter=entry)
    with pytest.raises(UsageError, match=r"whose head was trained|with DoRA"):
        check_adapter(adapter)


@pytest.mark.slow
def test_the_command_applies_a_scale(
    trained: DomainModel, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = shutil.copytree(trained.out, tmp_path / "out")
    monkeypatch.chdir(out)
    where = ("--out", ".", "--base", str(tiny_base))
    assert run("curve", "spam", "--scale", "0.6", "--scales", "0,1", *where) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "spam has scale 0.6 now, as lora_alpha" in shown
    assert "lora-domains rollback spam 0001" in shown
    entry = Card.read(out / "spam").adapter
    assert (entry.scale, entry.verdict) == (0.6, None)
    assert [point["scale"] for point in entry.scale_curve["points"]] == [0.0, 0.6, 1.0]
    with monkeypatch.context() as patch:  # what was measured is not measured again
        patch.setattr("lora_domains.cli.verbs.analysis.open_model", None)
        assert run("curve", "spam", "--scale", "1", *where) == 0
        assert run("curve", "spam", "--scale", "1", *where) == 0
    assert "spam has scale 1 already" in capsys.readouterr().out
    assert fingerprint(out / "spam") == fingerprint(trained.out / "spam")
    assert run("curve", "spam", "--scale", "0.6", *where) == 0
    use_small_suite(monkeypatch)
    assert run("evaluate", "spam", *where) != 2
    entry = Card.read(out / "spam").adapter
    assert entry.scale == 0.6
    assert entry.verdict is not None
    assert run("curve", "spam", "--scale", "none", *where) == 2
