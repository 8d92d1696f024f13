"""The text of private rows is in no file, output, checkpoint or error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.models import SUITE, declared, model_in

from lora_domains.console import Display
from lora_domains.errors import DataError
from lora_domains.model import DomainModel
from lora_domains.report.card import read_items
from lora_domains.tasks import Generation

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
    tiny_base: Path, tmp_path: Path, project: Path, cache: Path,
    capfd: pytest.CaptureFixture[str], show_text: bool,
) -> None:  # fmt: skip
    made = declared(secret_rows(), epochs=1)
    made = replace(made, data=replace(made.data, group="patient"), show_text=show_text)
    out = tmp_path / "out"
    model = DomainModel.from_pretrained(tiny_base, out=out, display=Display(), device="cpu")
    model.fit(made)
    model.display.line(str(model.evaluate(made, suite=SUITE)))
    said = "".join(capfd.readouterr())
    assert "Verdict" in said
    written = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    written |= {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    kept = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert {p.parent.name for p in kept} == {"scores", "predictions"}
    written |= kept
    assert len(written) >= 9  # five of the adapter, two keys, the ledger and its head
    for name, secret in SECRETS.items():
        found = [p.name for p, content in written.items() if secret.encode() in content]
        assert found == (["items.jsonl"] if show_text and name in ("train", "test") else []), name
        assert not any(secret in str(p) for p in written)
        assert secret not in said


def repeated() -> list[dict[str, Any]]:
    """Rows with one answer, which the nearest answer repeats."""
    return [{"question": row["text"], "answer": SECRETS["train"]} for row in make_rows(60)]


@pytest.mark.parametrize("show_text", [False, True])
def test_generated_answers_are_stored_with_show_text_only(
    tiny_base: Path, tmp_path: Path, project: Path, show_text: bool
) -> None:
    task = Generation(max_new_tokens=2)
    made = replace(declared(repeated(), "answers", task, epochs=1), show_text=show_text)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    entry = model.evaluate(made, suite=SUITE).entry
    model.benchmark(SUITE, [made], tmp_path / "reports", show_text=show_text)
    assert entry.domain_scores["exact_match"]["baselines"]["nearest"] == 1  # the secret itself
    written = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    written |= {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    found = {p.name for p, text in written.items() if SECRETS["train"].encode() in text}
    assert found == ({"items.jsonl"} if show_text else set())
    (first, *_) = (item for item in read_items(tmp_path / "answers") if item["set"] == "test")
    assert ("answers" in first) == show_text
    if show_text:
        assert {"reference", "base", "adapter", "nearest"} <= first["answers"].keys()
        assert first["answers"]["nearest"] == first["answers"]["reference"] == SECRETS["train"]


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
        calls += not args[1][0].id.startswith("trial")  # on which memory is measured
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
