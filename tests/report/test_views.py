"""What every view shows beside the verdict: gates that inform, scores without near leaks."""

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from support.folders import CARD, VALID_CARD, folder
from support.items import general, table, text, train_like

from lora_domains.adapters.readme import readme
from lora_domains.cli.parser import EXIT
from lora_domains.report.report import Evaluation, combine, rebuild, save_report
from lora_domains.report.text import INFORMS


@pytest.fixture
def warned(tmp_path: Path) -> Path:
    """An adapter that passes and whose gap warns."""
    rows = [*table(400, 100, 80, 420), *train_like(500, 0, 0, 500), *general(), *text()]
    for item in rows:
        if item["set"] == "train":
            item["scores"]["adapter"]["nll"] = 0.001
    gates = {"recall": 0.7, "precision": 0.7, "calibration": None}
    settings = CARD["adapters"][0]["settings"] | {"gates": gates}
    return folder(tmp_path, "triage", rows, base={"id": "tiny"}, settings=settings)


def test_every_view_shows_warnings_after_the_gates_that_decide(
    warned: Path, tmp_path: Path
) -> None:
    (warned / "card.json").write_text(rebuild(warned).dumps())
    card = rebuild(warned)
    assert not list(VALID_CARD.iter_errors(json.loads(card.dumps())))
    verdicts = [gate["verdict"] for gate in card.adapter.gates]
    informing = {"drift": "note", "overfit": "warning", "memorisation": "warning",
                 "calibration": "note"}  # fmt: skip
    assert {g["name"]: g["verdict"] for g in card.adapter.gates[-4:]} == informing
    assert set(verdicts[:-4]) == {"pass"}
    assert EXIT[card.adapter.outcome] == 0
    save_report(combine([warned]), tmp_path / "out")
    views = [str(Evaluation(card)), readme(card)]
    views += [(tmp_path / "out" / name).read_text() for name in ("report.md", "report.html")]
    for view in views:
        decides, informs = " ".join(view.split()).split(INFORMS)  # a terminal breaks lines
        assert "The adapter beats it" in decides
        assert "The gap is" not in decides
        assert "The gap is" in informs
    assert "| overfit (warning), memorisation (warning) |" in views[2]
    root = Xml.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (root.attrib["failures"], root.attrib["errors"]) == ("0", "0")
    names = [case.attrib["name"] for case in root.iter("testcase")]
    assert names.index("overfit") > names.index("effect")
    (case,) = (case for case in root.iter("testcase") if case.attrib["name"] == "overfit")
    assert (case[0].tag, (case[0].text or "").split(":")[0]) == ("system-out", "Warning")


def test_every_view_shows_the_scores_without_near_leaks(tmp_path: Path) -> None:
    leaks = {"exact": 0, "near": 30, "pairs": [["train:1", f"test:{n}", "near"] for n in range(30)]}
    made = folder(tmp_path, "triage", leaks=leaks)
    card = rebuild(made)
    assert not list(VALID_CARD.iter_errors(json.loads(card.dumps())))
    assert card.adapter.without_near_leaks["accuracy"]["n"] == 970
    save_report(combine([made]), tmp_path / "out")
    views = [str(Evaluation(card)), readme(card)]
    views += [(tmp_path / "out" / name).read_text() for name in ("report.md", "report.html")]
    clean = f"{card.adapter.without_near_leaks['f1']['adapter']:.3f}"
    for view in views:
        before, after = view.split("Without 30 rows nearly the same as a training row")
        assert clean not in before
        assert clean in after
