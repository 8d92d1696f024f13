"""The typed card: it reads back what it writes, and refuses what its schema refuses."""

import copy
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from support.folders import CARD, EVALUATIONS, SCHEMAS, VALID, VALID_CARD, folder, items, seeds

from lora_domains.errors import AdapterCorrupt
from lora_domains.report.card import OLD_SETTINGS, AdapterEntry, BaseRecord, Card, schema
from lora_domains.report.report import combine, rebuild
from lora_domains.tasks import KINDS, task_from_record

VIEWS = ("html", "markdown", "junit", "charts", "terminal", "report")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A card in JSON with nearly everything a card can hold."""
    points = [{"scale": 1.0, "score": 0.9, "difference": 0.4, "lower": 0.3, "upper": None,
               "nats": 1.2, "kl": 0.1}]  # fmt: skip
    curve = {"metric": "f1", "rows": 10, "texts": 3, "base": {"score": 0.5, "nats": 1.1},
             "points": points, "best": 1.0, "loss": 0.03, "least": None}  # fmt: skip
    rows = items()
    for n, item in enumerate(rows):
        if item["set"] == "test":
            item["slices"] = {"ward": "north" if n % 2 else "south"}
            item["scores"]["adapter"]["positive"] = 0.5
    made = folder(
        tmp_path_factory.mktemp("card"), rows=rows, evaluations=EVALUATIONS, seeds=seeds(),
        leaks={"exact": 0, "near": 1, "pairs": [["train:4", "test:0", "near"]]},
        scale_curve=curve, parent={"name": "older", "sha256": "0" * 64},
        trained_rows={"key": "0" * 8, "own": "AAAAAAAA", "inherited": ""},
    )  # fmt: skip
    card = rebuild(made)
    card.adapter.mistakes = []
    card.adapter.over_parent = {"f1": {"parent": 0.5} | {
        k: v for k, v in card.adapter.domain_scores["f1"].items() if k not in ("base", "baselines")
    }}  # fmt: skip
    written: dict[str, Any] = json.loads(card.dumps())
    return written


# ── One shape ───────────────────────────────────────────────────────────────────────────────────


def test_dataclasses_and_schema_have_the_same_keys(whole: dict[str, Any]) -> None:
    parts = SCHEMAS["card"]["$defs"]
    assert schema() == SCHEMAS["card"]
    assert set(parts["adapter"]["properties"]) == {part.name for part in fields(AdapterEntry)}
    assert set(parts["base"]["properties"]) == {part.name for part in fields(BaseRecord)}
    # What no evaluation of this card has: several environments, another task or place of training,
    # an encoder with a head that transformers lacks, a chat template, another scale than trained.
    missing = {"environment", "trained_with", "trained_elsewhere", "pooling", "chat", "scale"}
    assert whole["adapters"][0].keys() == set(parts["adapter"]["properties"]) - missing


def test_a_card_reads_back_what_it_writes(whole: dict[str, Any], tmp_path: Path) -> None:
    VALID_CARD.validate(whole)
    card = Card.from_json(whole, "here")
    assert card.to_json() == whole
    card.write(tmp_path)
    assert Card.read(tmp_path) == card
    least = {"schema": 1, "base": whole["base"], "adapters": [{"domain": "a", "sha256": "0"}]}
    entry = Card.from_json(least, "here").adapter
    assert (entry.path, entry.verdict, entry.outcome) == ("a", None, "inconclusive")
    VALID_CARD.validate(Card.from_json(least, "here").to_json())


# ── Validation ──────────────────────────────────────────────────────────────────────────────────


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of everything in ``value``."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key, part in value.items() for place in places(part, (*path, key))]
    if isinstance(value, list):
        found += [place for n, part in enumerate(value[:2]) for place in places(part, (*path, n))]
    return found


@given(data=st.data())
def test_validation_agrees_with_the_schema(whole: dict[str, Any], data: st.DataObject) -> None:
    card = copy.deepcopy(whole)
    *path, last = data.draw(st.sampled_from(places(card)))
    part = card
    for step in path:
        part = part[step]
    odd = st.sampled_from(
        [None, True, -1, 0.5, 1e9 + 0.5, "x", "pass", [], [[]], {}, {"x": 1}, "delete"]
    )
    value = data.draw(odd)
    if value == "delete":
        del part[last]
    else:
        part[last] = value
    try:
        Card.from_json(card, "here")
        refused = False
    except AdapterCorrupt:
        refused = True
    assert refused == (not VALID_CARD.is_valid(card))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("base", "dtype"), 5, "base.dtype: expected string; found int '5'"),
        (("adapters", 0, "training", "seconds"), "x", r"adapters\[0\]\.training\.seconds: "),
        (("adapters", 0, "gates", 2, "verdict"), "maybe", r"gates\[2\]\.verdict: expected one of"),
        (("adapters", 0, "invented"), 1, r"adapters\[0\]\.invented: expected a known key"),
        (("adapters", 0, "settings", "training", "lr"), float("nan"),
         r"settings\.training\.lr: expected a finite number; found float 'nan'"),
    ],
)  # fmt: skip
def test_an_error_names_the_key(
    whole: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: Any, where: str
) -> None:
    card = copy.deepcopy(whole)
    part: Any = card
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(AdapterCorrupt, match=rf"card\.json, .*{where}"):
        Card.read(tmp_path)


def test_what_could_not_be_read_is_not_written(whole: dict[str, Any], tmp_path: Path) -> None:
    card = Card.from_json(copy.deepcopy(whole), "here")
    card.write(tmp_path)
    before = (tmp_path / "card.json").read_text()
    card.adapter.judged["largest_move"] = float("inf")
    with pytest.raises(AdapterCorrupt, match=r"judged\.largest_move: expected a finite number"):
        card.write(tmp_path)
    assert (tmp_path / "card.json").read_text() == before


@pytest.mark.parametrize("where", ["", "adapters/0", "adapters/0/gates/0", "base"])
def test_the_schema_refuses_what_it_does_not_name(three: list[Path], where: str) -> None:
    report: Any = combine(three).to_json()
    part = report
    for step in where.split("/") if where else []:
        part = part[int(step)] if step.isdigit() else part[step]
    part["invented"] = 1
    with pytest.raises(jsonschema.ValidationError, match="invented"):
        VALID.validate(report)


def test_former_defaults_of_an_older_card_are_no_limits(tmp_path: Path) -> None:
    settings = copy.deepcopy(CARD["adapters"][0]["settings"])
    settings["gates"] = {"retention": 0.03, "drift": 0.23, "overfit": 0.2, "memorisation": 0.75}
    gates = Card.read(folder(tmp_path, settings=settings)).adapter.settings["gates"]
    assert gates == {"retention": 0.03, "drift": None, "overfit": 0.2, "memorisation": None}
    older = Card.read(folder(tmp_path, "embedded")).adapter.judged
    other = Card.read(folder(tmp_path, "other", base={"id": "tiny"})).adapter.judged
    assert (older["embedded_base"], other["embedded_base"]) == (True, False)
    settings["gates"]["calibration"] = None  # a card of today: the domain set these limits
    declared = Card.read(folder(tmp_path, "today", settings=settings)).adapter.settings["gates"]
    assert declared == settings["gates"]


def test_the_targets_of_an_older_card_get_their_current_names(tmp_path: Path) -> None:
    judged, settings = (copy.deepcopy(CARD["adapters"][0][k]) for k in ("judged", "settings"))
    older = {"wanted": {"recall": 0.9}, "threshold": 0.3}
    judged["threshold"] = older
    settings["task"] |= {"wanted_recall": 0.9, "wanted_precision": None}
    path = folder(tmp_path, judged=judged, settings=settings, trained_with=settings,
                  curve={"positive": "urgent", **older})  # fmt: skip
    entry = Card.read(path).adapter
    assert task_from_record(entry.task).targets == {"recall": 0.9}
    assert entry.task == entry.trained_with["task"]
    assert entry.task.keys().isdisjoint({"wanted_recall", "wanted_precision", "loss_unit"})
    assert entry.judged["threshold"] == {"targets": {"recall": 0.9}, "threshold": 0.3}
    assert entry.curve == {"positive": "urgent", "targets": {"recall": 0.9}, "threshold": 0.3}
    # A card that has none of these is read without the kinds of tasks.
    assert {name for kind in KINDS.values() for name in kind.renamed} <= OLD_SETTINGS


def test_an_older_card_loses_its_packed_answers_and_gets_gate_names(whole: dict[str, Any]) -> None:
    older = copy.deepcopy(whole)
    entry = older["adapters"][0]
    entry["answers"] = {"domain": {"prediction": "eJw="}}
    new = {"effect": "alive", "evaluations": "looks"}
    for gate in entry["gates"]:
        gate["name"] = new.get(gate["name"], gate["name"])
    assert {"alive", "looks"} <= {gate["name"] for gate in entry["gates"]}
    assert Card.from_json(older, "here").to_json() == whole


def test_an_older_card_is_held_to_the_budget_of_today(whole: dict[str, Any]) -> None:
    older = copy.deepcopy(whole)
    entry = older["adapters"][0]
    del entry["evaluations"]
    entry["looks"] = {"test_set": "0" * 64, "before": 3, "adapters": 1, "level": 0.997,
                      "broken": None}  # fmt: skip
    assert Card.from_json(older, "here").to_json() == whole
    entry["looks"] = {"adapters": "one"}
    with pytest.raises(AdapterCorrupt, match="looks"):
        Card.from_json(older, "here")


def test_only_the_card_knows_its_place_in_the_file() -> None:
    for part in ("lora_domains", "benchmarks", "recipes"):
        for path in (ROOT / part).rglob("*.py"):
            assert '["adapters"][0]' not in path.read_text(encoding="utf-8"), path


# ── Imports ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_reading_imports_no_view(tmp_path: Path) -> None:
    made = folder(tmp_path)
    code = (
        "import sys, lora_domains.report.card, lora_domains.adapters.loading\n"
        "from pathlib import Path\n"
        "from lora_domains.report.card import Card\n"
        f"Card.read(Path({str(made)!r}))\n"
        f"views = {{f'lora_domains.report.{{name}}' for name in {VIEWS!r}}}\n"
        "print(sorted((views | {'jinja2', 'rich'}) & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_loading_an_adapter_does_not_check_figures_but_writing_its_card_does(
    tmp_path: Path,
) -> None:
    there = folder(tmp_path, per_class={"urgent": "high"})
    with pytest.raises(AdapterCorrupt, match="per_class"):
        Card.read(there)
    card = Card.read(there, measured=False)
    with pytest.raises(AdapterCorrupt, match="per_class"):
        card.dumps()
