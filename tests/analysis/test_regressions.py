"""What got worse since older adapters."""

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from rich.console import Console
from support.commands import run
from support.folders import (
    CARD,
    FAILS,
    PASSES,
    UNSURE,
    VALID,
    changes,
    folder,
    items,
)
from support.items import table

from lora_domains.analysis.regressions import older_adapters, regressions, since_replaced
from lora_domains.errors import AdapterCorrupt, UsageError
from lora_domains.report.card import Card, read_items
from lora_domains.report.conclusion import conclusion
from lora_domains.report.conclusion import replaced as in_words
from lora_domains.report.report import Evaluation, combine, rebuild
from lora_domains.report.text import worsened
from lora_domains.stats.comparisons import compare_f1


def since(tmp_path: Path, before: Any, now: Any) -> dict[str, Any]:
    old, new = (folder(tmp_path / n, rows=rows) for n, rows in (("old", before), ("new", now)))
    return changes([old], [new])


@pytest.mark.parametrize(
    ("counts", "lost", "worse"),
    [(PASSES, 0, set()), ((458, 42, 30, 470), 0, set()), ((400, 100, 60, 440), 0, {"f1"}),
     (PASSES, 40, {"general"}), ((480, 20, 20, 480), 0, set())],
)  # fmt: skip
def test_a_figure_is_worse_when_it_fell_beyond_its_bounds(
    tmp_path: Path, counts: tuple[int, ...], lost: int, worse: set[str]
) -> None:
    found = since(tmp_path, items(), items(counts, lost=lost))["adapters"]["triage"]
    assert {name for name, f in found["figures"].items() if f["worse"]} == worse
    for figure in found["figures"].values():
        assert figure["lower"] <= figure["change"] <= figure["upper"]


def test_the_same_rows_are_compared_item_by_item_and_others_by_their_gains(
    tmp_path: Path,
) -> None:
    # A base that guesses makes the gain uncertain, but the adapter clearly got worse.
    random = np.random.default_rng(0)
    before = items((240, 10, 10, 240))
    for item in before:
        if item["set"] == "test":
            item["scores"]["base"]["prediction"] = int(random.integers(2))
    now = copy.deepcopy(before)
    for item in now[:12]:
        item["scores"]["adapter"]["prediction"] = 0
    old, new = (folder(tmp_path / n, rows=rows) for n, rows in (("old", before), ("new", now)))
    figure = changes([old], [new])["adapters"]["triage"]["figures"]["f1"]
    assert (figure["paired"], figure["worse"]) == (True, True)
    entries = [rebuild(path).adapter.domain_scores["f1"] for path in (old, new)]
    assert [figure["before"], figure["now"]] == [e["adapter"] for e in entries]
    truth, was, is_ = (
        np.array(
            [
                s["target"] if k is None else s["scores"]["adapter"][k]
                for s in part
                if s["set"] == "test"
            ]
        )
        for part, k in ((now, None), (before, "prediction"), (now, "prediction"))
    )
    # F1 is worse, so general knowledge is then held to the usual level (Holm).
    wanted = compare_f1(truth, was, is_, 1, level=0.975)
    assert (figure["lower"], figure["upper"]) == pytest.approx((wanted.lower, wanted.upper))
    # On other rows only the gains can be compared, and they do not decide it.
    card = Card.read(new)
    card.adapter.data = {"test": "f" * 64}
    card.write(new)
    figure = changes([old], [new])["adapters"]["triage"]["figures"]["f1"]
    assert (figure["paired"], figure["worse"]) == (False, False)
    assert [figure["before"], figure["now"]] == [e["difference"] for e in entries]
    assert figure["lower"] < wanted.lower < wanted.upper < figure["upper"]


def test_groups_stay_together_when_old_and_new_are_paired(tmp_path: Path) -> None:
    before, now = items((90, 10, 10, 90)), items((80, 20, 10, 90))
    widths = []
    for name in ("alone", "together"):
        folders = []
        for n, rows in enumerate((before, now)):
            if name == "together":
                rows = [r | {"group": f"g{i // 10}"} for i, r in enumerate(rows)]
            folders.append([folder(tmp_path / f"{name}{n}", rows=rows)])
        found = changes(*folders)["adapters"]["triage"]["figures"]["f1"]
        assert found["paired"]
        widths.append(found["upper"] - found["lower"])
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.long
def test_a_small_loss_of_one_of_many_adapters_is_no_regression(tmp_path: Path) -> None:
    """Alone it is worse by its bound; beside four others, chance shows as much (Holm)."""
    names = ["a", "b", "c", "d", "e"]
    small = (455, 45, 30, 470)
    counts = dict.fromkeys(names, PASSES) | {"c": small}
    old = [folder(tmp_path / "old", name) for name in names]
    new = [folder(tmp_path / "new", name, rows=items(counts[name])) for name in names]
    alone = changes([old[2]], [new[2]])["adapters"]["c"]["figures"]["f1"]
    among = changes(old, new)
    figure = among["adapters"]["c"]["figures"]["f1"]
    assert (alone["level"], alone["worse"]) == (0.975, True)
    assert (figure["level"], figure["worse"]) == (0.995, False)
    assert figure["change"] == alone["change"]
    assert not among["worse"]
    # One that clearly lost is found all the same, and sets the others free.
    counts["a"] = (300, 200, 30, 470)
    new[0] = folder(tmp_path / "worse", "a", rows=items(counts["a"]))
    found = changes(old, new)["adapters"]
    assert found["a"]["figures"]["f1"]["worse"]
    assert found["c"]["figures"]["f1"]["level"] == pytest.approx(1 - 0.05 / 9)


@pytest.mark.parametrize("part", ["items", "domain_scores", "gates"])
def test_a_broken_older_adapter_is_named(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = folder(tmp_path / "new"), folder(tmp_path / "old")
    if part == "items":
        (old / "items.jsonl").write_text('{"set": "test"}')
    else:
        card = json.loads((old / "card.json").read_text())
        card["adapters"][0][part] = 5
        (old / "card.json").write_text(json.dumps(card))
    out = tmp_path / "out"
    assert run("report", str(new), "--out", str(out), "--against", str(tmp_path / "old")) == 2
    assert "AdapterCorrupt triage" in capsys.readouterr().err
    assert not out.exists()


def test_of_several_broken_older_adapters_the_first_of_the_report_is_named(tmp_path: Path) -> None:
    names = ["f", "b", "e", "a", "d", "c"]
    new, old = ([folder(tmp_path / part, name) for name in names] for part in ("new", "old"))
    report, rows = combine(new), {path.name: read_items(path) for path in new}
    for path in old:
        (path / "items.jsonl").write_text("{")
    older = {path.name: path for path in old}
    with pytest.raises(AdapterCorrupt, match=r"^f/items\.jsonl"):
        regressions(report, rows.__getitem__, older, "main")


def test_a_gate_that_turned_is_shown_and_one_that_is_counted_is_worse(tmp_path: Path) -> None:
    found = since(tmp_path / "a", items(), items(FAILS))
    gates = {g["name"]: g for g in found["adapters"]["triage"]["gates"]}
    # Its figure is sampled: an adapter at the floor may turn by chance.
    assert gates["recall"] == {"name": "recall", "before": "pass", "now": "fail", "worse": False}
    assert "triage: gate recall went from pass to fail." in worsened(found)
    leak = {"leaks": {"exact": 1, "near": 0, "pairs": []}}
    found = changes([folder(tmp_path / "old")], [folder(tmp_path / "new", **leak)])
    (gate,) = found["adapters"]["triage"]["gates"]
    assert gate == {"name": "leaks", "before": "pass", "now": "fail", "worse": True}
    assert found["worse"]
    found = since(tmp_path / "b", items(), items(UNSURE))
    gates = {g["name"]: g for g in found["adapters"]["triage"]["gates"]}
    assert (gates["recall"]["now"], gates["recall"]["worse"]) == ("inconclusive", False)
    assert not found["worse"]
    assert "triage: gate recall went from pass to inconclusive." in worsened(found)


def test_a_lower_loss_is_not_worse(tmp_path: Path) -> None:
    entry = {"judged": CARD["adapters"][0]["judged"] | {"metric": "loss"}}
    one, two = [], []
    for n, sure in enumerate((0.9, 0.99)):
        rows = items()
        for item in rows:
            if item["set"] == "test":
                said = item["scores"]["adapter"]
                said["nll"] = said["nll"] * (1.0 if sure == 0.9 else 0.5)
        (one, two)[n].append(folder(tmp_path / str(n), rows=rows, **entry))
    better = changes(one, two)["adapters"]["triage"]["figures"]["loss"]
    worse = changes(two, one)["adapters"]["triage"]["figures"]["loss"]
    assert (better["worse"], worse["worse"]) == (False, True)


def test_worse_than_older_adapters_is_exit_1_and_shown_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both pass their gates; the new one has a lower recall.
    old = folder(tmp_path / "old", rows=items((490, 10, 10, 490)))
    new = folder(tmp_path / "new", rows=items((450, 50, 35, 465)))
    folder(tmp_path / "old", "gone")
    out = tmp_path / "out"
    assert run("report", str(old), "--out", str(out)) == 0
    capsys.readouterr()
    assert run("report", str(new), "--out", str(out), "--baseline", str(tmp_path / "old")) == 1
    said = capsys.readouterr().out
    assert "F1 on the same rows went from 0.980 to" in said
    assert "gone is missing from this report" in said
    report = json.loads((out / "report.json").read_text())
    VALID.validate(report)
    assert report["adapters"][0]["verdict"] == "pass"
    assert report["since"]["worse"]
    assert "Do not ship: worse than old" in said
    for view, figures in (("report.md", "| adapter |"), ("report.html", "At a glance")):
        shown = (out / view).read_text()
        assert "triage is worse than the one in old (F1 0.980 → 0.914" in shown
        assert "Ship it" not in shown
        assert shown.index("Worse since old") < shown.index(figures)
    cases = Xml.parse(out / "junit.xml").getroot()
    assert cases.attrib["failures"] == "1"
    assert run("report", str(new), "--out", str(out), "--against", str(tmp_path / "new")) == 0
    # A single adapter, such as an earlier version, has the name in its card.
    assert run("report", str(new), "--out", str(out), "--against", str(old)) == 1


def test_older_adapters_on_another_base_or_none_are_refused(tmp_path: Path) -> None:
    made, out = folder(tmp_path), tmp_path / "out"
    folder(tmp_path / "other", base={"identity": "f" * 64})
    assert run("report", str(made), "--out", str(out), "--against", str(tmp_path / "other")) == 2
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(UsageError, match="a folder of older adapters"):
            older_adapters(tmp_path / place)
        assert run("report", str(made), "--out", str(out), "--against", str(tmp_path / place)) == 2
    (tmp_path / "other" / "triage" / "card.json").write_text("{")
    assert run("report", str(made), "--out", str(out), "--against", str(tmp_path / "other")) == 2
    assert not out.exists()


# ── The version that an adapter replaced ────────────────────────────────────────────────────────


def replaced(there: Path, counts: Sequence[int], number: str = "0001", **changes: Any) -> Path:
    """A version of the adapter ``there``/triage with these counts, and dummies of PEFT's files."""
    made = folder(there / ".versions" / "triage", "triage", items(counts), **changes)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).write_text("{}")
    return made.rename(made.with_name(number))


def test_an_adapter_worse_than_the_version_that_it_replaced(tmp_path: Path) -> None:
    new = folder(tmp_path, rows=items((450, 50, 35, 465)), sha256="1" * 64)
    card = rebuild(new)
    assert since_replaced(card, new) is None
    replaced(tmp_path, (490, 10, 10, 490), "0001")
    replaced(tmp_path, (300, 200, 10, 490), "0002", sha256="1" * 64)  # the same bytes
    since = since_replaced(card, new)
    assert since is not None
    sentence = conclusion(card.adapter, since)
    assert "triage is worse than version 0001, which it replaced (F1 0.980 → 0.914" in sentence
    assert sentence.endswith("to restore that: lora-domains rollback triage 0001.")
    assert "Ship it" not in sentence
    assert sentence in " ".join(shown(card, since).split())


def test_a_version_that_cannot_be_compared_is_passed_over(tmp_path: Path) -> None:
    new = folder(tmp_path, rows=items((450, 50, 35, 465)), sha256="1" * 64)
    card = rebuild(new)
    replaced(tmp_path, (490, 10, 10, 490), "0001", base={"identity": "f" * 64})
    (replaced(tmp_path, (490, 10, 10, 490), "0002") / "items.jsonl").unlink()
    (replaced(tmp_path, (490, 10, 10, 490), "0003") / "card.json").write_text("{")
    replaced(tmp_path, (490, 10, 10, 490), "0004", judged={})
    assert since_replaced(card, new) is None
    replaced(tmp_path, (440, 60, 45, 455), "0005")
    since = since_replaced(card, new)
    assert since is not None
    assert not since["worse"]
    assert conclusion(card.adapter, since).endswith("Ship it.")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((490, 10, 10, 490), "is worse than version 0001, which it replaced (F1 0.980 → 0.913)"),
        ((457, 43, 43, 457), "shows no clear difference from version 0001, which it replaced (F1"),
        ((448, 52, 36, 464), "shows no clear difference from version 0001, which it replaced (F1"),
        ((300, 200, 90, 410), "is better than version 0001, which it replaced (F1 0.674 → 0.913)"),
    ],
)
@pytest.mark.parametrize("where", ["test", "validation"])
def test_a_retrained_adapter_is_worse_only_where_its_bound_says_so(
    tmp_path: Path, where: str, counts: tuple[int, ...], words: str
) -> None:
    def rows(these: tuple[int, ...]) -> list[Any]:
        return items(these) if where == "test" else table(*these, where="validation")

    new = folder(tmp_path, rows=rows((450, 50, 36, 464)), sha256="1" * 64)
    older = replaced(tmp_path, counts, "0001")
    if where == "validation":
        for made in (new, older):
            forget_the_evaluation(made)
        lines = "".join(json.dumps(row) + "\n" for row in rows(counts))
        (older / "items.jsonl").write_text(lines)
    card = rebuild(new)
    since = since_replaced(card, new, validation=where == "validation")
    assert since is not None
    assert since["version"] == "0001"
    sentence = in_words(card.adapter, since)
    assert words in sentence
    assert sentence.endswith("lora-domains rollback triage 0001.") == ("worse" in words)


def forget_the_evaluation(made: Path) -> None:
    """Leave a card as training writes it."""
    card = json.loads((made / "card.json").read_text())
    for key in ("judged", "verdict"):
        card["adapters"][0].pop(key, None)
    card["adapters"][0]["settings"]["task"]["labels"] = ["routine", "urgent"]
    (made / "card.json").write_text(json.dumps(card))


def test_versions_without_scores_on_validation_rows_are_passed_over(tmp_path: Path) -> None:
    rows = table(450, 50, 36, 464, where="validation")
    new = folder(tmp_path, rows=rows, sha256="1" * 64)
    for made in (new, replaced(tmp_path, PASSES, "0001")):
        forget_the_evaluation(made)
    assert since_replaced(rebuild(new), new, validation=True) is None


def shown(card: Card, since: dict[str, Any]) -> str:
    text = io.StringIO()
    Evaluation(card).show(Console(file=text, width=200), since)
    return text.getvalue()
