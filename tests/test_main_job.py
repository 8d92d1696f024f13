"""The teaching example on the embedded rows, as a user would run it: CSV in, verdict out."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_domains import DomainModel, load_domain
from lora_domains.console import Display
from lora_domains.embedded.world import domain_rows

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tutorial_experiment(tmp_path: Path) -> None:
    """Published: accuracy .65 → .875, loss 1.2 → .42, in fewer than 10 epochs."""
    for split in ("train", "validation", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(domain_rows("medical", split))
    done = subprocess.run(
        [sys.executable, "-m", "lora_domains.cli.main", "fit", "--name", "tutorial",
         "--train", "train.csv", "--validation", "validation.csv", "--test", "test.csv",
         "--positive", "urgent", "--epochs", "4"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    entry = json.loads((tmp_path / "adapters/tutorial/card.json").read_text())["adapters"][0]
    scores = entry["domain_scores"]
    assert scores["accuracy"]["base"] <= 0.65
    assert scores["accuracy"]["adapter"] >= 0.87
    assert scores["loss"]["adapter"] < 0.42
    assert scores["precision"]["adapter"] > 0.85
    assert scores["recall"]["adapter"] > 0.80
    assert len(entry["training"]["history"]) < 10
    assert entry["general"]["pooled"]["lower"] > -0.03
    assert scores["f1"]["adapter"] > scores["f1"]["baselines"]["tfidf"]


@pytest.mark.slow
def test_a_reckless_rate_visibly_forgets_and_the_default_keeps(tmp_path: Path) -> None:
    """Ten times the learning rate without retention fails the gates that the default passes."""
    declared = load_domain(ROOT / "recipes" / "medical.py")
    declared = replace(declared, data=replace(declared.data, limit=320))
    lost = {}
    for name, settings in {
        "reckless": {"lr": 0.03, "retention": "none"},
        "sound": {"lr": 0.003},
    }.items():
        quiet = Display(quiet=True)
        model = DomainModel.from_pretrained(out=tmp_path / name, device="cpu", display=quiet)
        model.fit(declared, epochs=2, **settings)
        entry = model.evaluate(declared).entry
        lost[name] = -entry.general["pooled"]["difference"]
        verdicts = {gate["name"]: gate["verdict"] for gate in entry.gates}
        assert verdicts["retention"] == ("pass" if name == "sound" else "fail")
        assert verdicts["drift"] == ("pass" if name == "sound" else "fail")
        assert verdicts["frozen"] == "pass"
    assert lost["reckless"] > 0.1
    assert lost["sound"] < 0.03
