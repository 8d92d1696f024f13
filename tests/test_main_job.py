"""The teaching example on the embedded rows, as a user would run it: CSV in, verdict out."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import fork
from support.general_text import use_all_texts, use_general_text

from lora_domains import Data, DomainModel, load_domain
from lora_domains.cli import main as cli
from lora_domains.console import Display
from lora_domains.embedded.world import domain_rows
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.suite import embedded
from lora_domains.report.card import AdapterEntry, Card

ROOT = Path(__file__).parents[1]
ROWS = {"train": 1600, "validation": 100, "test": 300}
"""How many of the rows are used; validation and test rows are fewer, for speed."""
FEW = {"train": 480, "validation": 40, "test": 60}


def fitted(folder: Path, counts: dict[str, int], *flags: str, whole: bool) -> AdapterEntry:
    """What the command line trains and evaluates on so many rows of each split, with all general
    texts; if not ``whole``, with few of those that are not trained on."""
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(domain_rows("medical", split)[:count])
    words = ["fit", "--name", "tutorial", "--train", "train.csv", "--validation", "validation.csv",
             "--test", "test.csv", "--positive", "urgent", *flags]  # fmt: skip

    def job() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                use_all_texts(patch)
            else:
                monitored = embedded_texts("validation")[:50]
                use_general_text(patch, embedded_texts("train"), monitored)
            cli.main(words)

    code, _, errors = fork(job, folder).ended()
    assert code in (0, 1, 3), errors
    return Card.read(folder / "adapters" / "tutorial").adapter


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> AdapterEntry:
    """The published example, with the default settings."""
    return fitted(tmp_path_factory.mktemp("tutorial"), ROWS, "--epochs", "3", whole=True)


def verdicts(entry: AdapterEntry) -> dict[str, str]:
    return {gate["name"]: gate["verdict"] for gate in entry.gates}


@pytest.mark.slow
def test_one_epoch_on_few_rows_learns_and_keeps_what_the_base_knows(tmp_path: Path) -> None:
    entry = fitted(tmp_path, FEW, "--epochs", "1", "--questions", "80", whole=False)
    accuracy, loss = (entry.domain_scores[name] for name in ("accuracy", "loss"))
    assert accuracy["base"] <= 0.65
    assert accuracy["adapter"] >= accuracy["base"] + 0.1
    assert loss["adapter"] <= loss["base"] - 0.2
    assert entry.general["pooled"]["difference"] > -0.03
    found = verdicts(entry)
    assert found["retention"] in ("pass", "inconclusive")
    assert found["drift"] == found["frozen"] == found["effect"] == found["leaks"] == "pass"


@pytest.mark.long
@pytest.mark.slow
def test_the_tutorial_experiment(tutorial: AdapterEntry) -> None:
    """Published: accuracy .65 → .875, loss 1.2 → .42, in fewer than 10 epochs."""
    assert tutorial.verdict in ("pass", "inconclusive")
    scores = tutorial.domain_scores
    assert scores["accuracy"]["base"] <= 0.65
    assert scores["accuracy"]["adapter"] >= 0.87
    assert scores["loss"]["adapter"] < 0.42
    assert scores["precision"]["adapter"] > 0.85
    assert scores["recall"]["adapter"] > 0.80
    assert len(tutorial.training["history"]) < 10
    assert tutorial.general["pooled"]["lower"] > -0.03
    assert scores["f1"]["adapter"] > scores["f1"]["baselines"]["tfidf"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("all_texts")
def test_a_reckless_rate_visibly_forgets_and_the_default_keeps(
    tutorial: AdapterEntry, tmp_path: Path
) -> None:
    """Ten times the learning rate without retention fails the gates that the default passes."""
    declared = load_domain(ROOT / "recipes" / "medical.py")
    # Few rows: none of the gates below depends on how many are tested.
    rows = [domain_rows("medical", split)[:count]
            for split, count in (("train", 160), ("validation", 32), ("test", 32))]  # fmt: skip
    declared = replace(declared, data=Data(*rows))
    model = DomainModel.from_pretrained(out=tmp_path, device="cpu", display=Display(quiet=True))
    model.fit(declared, epochs=1, lr=0.03, retention="none")
    reckless = model.evaluate(declared, suite=replace(embedded(), limit=200)).entry
    for entry, verdict in ((reckless, "fail"), (tutorial, "pass")):
        found = verdicts(entry)
        assert (found["retention"], found["drift"], found["frozen"]) == (verdict, verdict, "pass")
    assert reckless.general["pooled"]["difference"] < -0.1
    assert tutorial.general["pooled"]["difference"] > -0.03
