"""What a newcomer has at hand gets to a verdict by one command: files of chats and instructions, a
semicolon CSV of a European Excel, and a folder of transformers' Trainer and PEFT."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import FAST, run, write
from support.encoders import make_sentence_encoder
from support.models import use_small_suite
from support.peft_folders import peft_saved

from lora_domains.analysis.reproduce import BASES, base_named_by
from lora_domains.cli.parser import EXIT
from lora_domains.errors import UsageError
from lora_domains.report.card import Card

ROWS = [row | {"text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(90))]


def sharegpt(path: Path) -> None:
    conversations = [
        {"id": f"identity_{n}", "conversations": [
            {"from": "human", "value": row["text"]}, {"from": "gpt", "value": row["label"]},
            *([{"from": "human", "value": f"sure {n}"}, {"from": "gpt", "value": "yes"}] * (n % 2)),
        ]} for n, row in enumerate(ROWS)
    ]  # fmt: skip
    path.write_text(json.dumps(conversations, indent=2))


def alpaca(path: Path) -> None:
    rows = [
        {"instruction": "Label it." if n % 2 else row["text"],
         "input": row["text"] if n % 2 else "", "output": row["label"]}
        for n, row in enumerate(ROWS)
    ]  # fmt: skip
    path.write_text(json.dumps(rows, indent=4))


def excel(path: Path) -> None:
    """With a BOM, semicolons, line breaks in cells and decimal commas."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";", lineterminator="\r\n")
        writer.writerow(["Nr", "Rückmeldung", "Betrag", "Stimmung"])
        for n, row in enumerate(ROWS):
            mood = "verärgert" if row["label"] == "spam" else "zufrieden"
            amount = f"{n / 7:.2f}".replace(".", ",")
            writer.writerow([n, f"Größe; {row['text']}\nGruß", amount, mood])


GERMAN = ("--text", "Rückmeldung", "--label", "Stimmung", "--positive", "verärgert")
FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "sharegpt.json": (sharegpt, (), "chat"),
    "alpaca_data.json": (alpaca, (), "chat"),
    "kunden.csv": (excel, GERMAN, "classification"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gets_to_a_verdict_by_one_command(
    name: str, tmp_path: Path, tiny_base: Path, small_suite: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_file, flags, kind = FILES[name]
    write_file(Path(name))
    code = run("fit", name, *flags, "--evaluate", "--base", str(tiny_base), "--retention", "none",
               "--max-steps", "3", "--max-length", "64", *FAST)  # fmt: skip
    entry = Card.read(Path("adapters", Path(name).stem)).adapter
    assert entry.verdict is not None
    assert code == EXIT[entry.verdict]
    assert entry.task["kind"] == kind
    assert entry.ledger["read"] == len(ROWS)
    assert next(iter(entry.domain_scores.values()))["n"] >= len(ROWS) // 5
    shown = capsys.readouterr().out
    assert f"Verdict: {entry.verdict}" in shown
    assert ("classes in proportion" in shown) == (kind == "classification")


@pytest.mark.slow
def test_a_folder_of_trainer_and_peft_gets_to_a_verdict_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    monkeypatch.chdir(tmp_path)
    base = make_sentence_encoder(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(base)
    labels = ["ham", "spam"]
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    read: Any = tokenizer([row["text"] for row in ROWS[:40]], padding=True)
    rows = Dataset.from_dict({**read, "labels": [labels.index(r["label"]) for r in ROWS[:40]]})
    options = TrainingArguments("trained", max_steps=4, report_to=[], use_cpu=True)
    trainer = Trainer(get_peft_model(classifier, config), options, train_dataset=rows)
    trainer.train()
    trainer.save_model("mine")  # which also leaves training_args.bin there, a pickle
    train, test = write(tmp_path / "train.csv", ROWS[:40]), write(tmp_path / "test.csv", ROWS[40:])
    use_small_suite(monkeypatch)
    capsys.readouterr()
    command = ("evaluate", "mine", "--train", train, "--test", test)
    assert run(*command) == 2
    assert "--labels ham,spam" in capsys.readouterr().err
    code = run(*command, "--labels", "ham,spam", "--positive", "spam")
    entry = Card.read(Path("adapters", "mine")).adapter
    assert entry.verdict is not None
    assert code == EXIT[entry.verdict]
    assert entry.trained_elsewhere
    assert entry.domain_scores["f1"]["n"] == 50
    assert "in the table of epochs" not in capsys.readouterr().out
    # The copy in adapters/ knows its base and its task too.
    assert run("predict", "mine", ROWS[0]["text"]) == 2
    assert "predict with the copy that this writes." in capsys.readouterr().err
    assert run("predict", "adapters/mine", ROWS[0]["text"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in labels


@pytest.mark.slow
def test_an_adapter_of_peft_is_evaluated_on_chats_as_they_are(
    tmp_path: Path, tiny_base: Path, small_suite: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    theirs, _ = peft_saved(tiny_base, tmp_path / "theirs", r=4)
    alpaca(tmp_path / "test.json")
    command = ("evaluate", str(theirs), "--test", "test.json", "--base", str(tiny_base))
    assert run(*command) in (1, 3)
    assert "chat, by the columns of the rows" in capsys.readouterr().out
    entry = Card.read(Path("adapters", "theirs")).adapter
    assert (entry.task["kind"], entry.judged["metric"]) == ("chat", "nats_per_token")
    # Labels that are numbers stay labels where --labels names them.
    stars = [{"text": f"{row['text']} {n}", "label": n % 30} for n, row in enumerate(ROWS)]
    named = ("--labels", ",".join(map(str, range(30))), "--name", "stars")
    assert run("evaluate", str(theirs), "--test", write(tmp_path / "stars.csv", stars),
               "--base", str(tiny_base), *named) in (1, 3)  # fmt: skip
    stars_of = Card.read(Path("adapters", "stars")).adapter.judged["labels"]
    assert stars_of == list(map(str, range(30)))
    assert run(*command, "--task", "chat", "--name", "again") in (1, 3)
    assert run("evaluate", "adapters/theirs", "--task", "chat", "--test", "test.json") == 2
    assert "Leave --task out" in capsys.readouterr().err


def test_the_base_of_an_adapter_is_the_one_that_its_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    folder.mkdir()

    def named(base: Any, **more: Any) -> tuple[str | None, str | None]:
        config = {"base_model_name_or_path": base, **more}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return base_named_by(folder)

    assert named("org/name", revision="ab12") == ("org/name", "ab12")
    assert named("gpt2", revision=None) == ("gpt2", None)
    assert named("embedded") == named(None) == named(["x"]) == (None, None)
    (tmp_path / "models").mkdir()
    assert named("models") == ("models", None)
    for absent in ("/home/alice/models/llama", "../llama", "a/b/c"):
        with pytest.raises(UsageError, match=r"names '.*', which is not here.* --base"):
            named(absent)
    (folder / "adapter_config.json").write_text("{")
    assert base_named_by(folder) == (None, None)
    assert not BASES.exists()
