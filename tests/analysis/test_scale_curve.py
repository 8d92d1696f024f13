"""Scale curves: 0 is the base, 1 the adapter, and no row of a gate is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from support.adapters import logits, strong
from support.commands import run
from support.models import SUITE

from lora_domains.analysis.scale_curve import (
    best_scale,
    check_scales,
    check_validation,
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
from lora_domains.modeling.base import load_base
from lora_domains.probes.general_text import embedded_texts, general_text
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
