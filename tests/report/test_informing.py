"""Gates that inform: shown after those that decide in every view, and without effect."""

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from support.folders import CARD, VALID_CARD, folder
from support.items import general, table, text, train_like

from lora_domains.cli.exits import EXIT
from lora_domains.report.markdown import readme
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
    return folder(
        tmp_path, "triage", rows, settings=CARD["adapters"][0]["settings"] | {"gates": gates}
    )


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
        decides, informs = view.split(INFORMS)
        assert "The adapter beats it" in decides
        assert "The gap is" not in decides
        assert "The gap is" in informs
    root = Xml.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (root.attrib["failures"], root.attrib["errors"]) == ("0", "0")
    names = [case.attrib["name"] for case in root.iter("testcase")]
    assert names.index("overfit") > names.index("effect")
    (case,) = (case for case in root.iter("testcase") if case.attrib["name"] == "overfit")
    assert (case[0].tag, (case[0].text or "").split(":")[0]) == ("system-out", "Warning")
