"""Comparing two adapters, or several seeds of one, on the same items and without a model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run
from support.items import general, score, text
from support.items import row as item_row

from lora_domains.analysis.compare import FLOORS, _Run, compare_adapters, compare_seeds
from lora_domains.errors import AdapterError
from lora_domains.report.card import AdapterEntry, BaseRecord, Card

Item = dict[str, Any]


def drawn(right: float, seed: int, count: int = 400, lost: int = 0) -> list[Item]:
    """The same test items for every seed; the adapter predicts a share of them correctly."""
    hard = np.random.default_rng(0).permutation(count) / count
    noise = np.random.default_rng(seed).normal(0, 0.05, count)
    items = []
    for n in range(count):
        target = n % 2
        said = target if hard[n] + noise[n] < right else 1 - target
        item = item_row(target, number=n, base=0, adapter=said)
        item["scores"]["adapter"] = score(said, target)
        items.append(item)
    for n, item in enumerate(found := [*items, *general(300, lost)]):
        item["digest"] = f"digest {n}"
    return found


def save(folder: Path, items: Sequence[Item], **judged: Any) -> Path:
    folder.mkdir(parents=True)
    entry = AdapterEntry(
        domain=folder.name, path=folder.name, sha256=folder.name,
        judged={"metric": "f1", "labels": ["no", "yes"], "positive": "yes", "suite": "embedded",
                "loss": "label cross-entropy", "base_changed": False, "largest_move": 1.0} | judged,
        leaks={"exact": 0, "near": 0, "pairs": []},
        settings={"task": {"kind": "classification", "positive": "yes"},
                  "gates": {"retention": 0.03, "recall": 0.5, "precision": 0.5}},
    )  # fmt: skip
    Card(base=BaseRecord("x", None, "x", "x", None), adapter=entry).write(folder)
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    return folder


def test_a_better_version_passes_and_a_worse_one_fails(
    tmp_path: Path,
) -> None:
    a, b = save(tmp_path / "a", drawn(0.7, 1)), save(tmp_path / "b", drawn(0.9, 2))
    better, worse, same = compare_adapters(a, b), compare_adapters(b, a), compare_adapters(a, a)
    assert (better["verdict"], worse["verdict"], same["verdict"]) == (
        "pass", "fail", "inconclusive",
    )  # fmt: skip
    fields = better["scores"]["accuracy"]
    assert (fields["base"], fields["adapter"]) == pytest.approx((0.7, 0.9), abs=0.05)
    assert fields["won"] - fields["lost"] == pytest.approx(400 * fields["difference"])
    assert better["general"]["n"] == 300
    assert same["scores"]["f1"]["difference"] == 0
    json.dumps(better, allow_nan=False)


def test_items_are_matched_by_digest_in_any_order(tmp_path: Path) -> None:
    items = drawn(0.9, 2)
    mixed = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    a = save(tmp_path / "a", drawn(0.7, 1))
    one, two = (compare_adapters(a, save(tmp_path / n, i)) for n, i in (("b", items), ("c", mixed)))
    assert one | {"b": ""} == two | {"b": ""}


def test_labels_may_be_in_another_order(tmp_path: Path) -> None:
    """The head of another tool numbers them as it likes; general questions have none."""
    a, items = save(tmp_path / "a", drawn(0.7, 1)), drawn(0.9, 2)
    b = save(tmp_path / "b", items)
    for item in items:
        for part in (item, *item["scores"].values()) if item["set"] == "test" else ():
            part |= {key: 1 - part[key] for key in ("target", "prediction") if key in part}
    swapped = save(tmp_path / "other" / "b", items, labels=["yes", "no"])
    assert compare_adapters(a, swapped) == compare_adapters(a, b)
    assert compare_adapters(swapped, a)["verdict"] == compare_adapters(b, a)["verdict"] == "fail"
    three = ["x", "y", "z"]
    several = [{**item, "truth": [1, 0, 0], "target": None, "digest": n, "scores": {
        who: {"predicted": [0, 0, 1], "probabilities": [0.1, 0.2, 0.7]} for who in item["scores"]
    }} for n, item in enumerate(drawn(0.9, 2)[:4])]  # fmt: skip
    runs = [_Run(save(tmp_path / name, several, labels=labels, positive=None))
            for name, labels in (("c", three), ("d", ["z", "x", "y"]))]  # fmt: skip
    runs[1].number_labels_as(runs[0])
    found = runs[1].items[0]
    assert found["truth"] == [0, 0, 1]  # it was of the label z
    assert found["scores"]["adapter"]["predicted"] == [0, 1, 0]
    assert found["scores"]["adapter"]["probabilities"] == [0.2, 0.7, 0.1]


def test_a_better_version_that_forgot_does_not_pass(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", drawn(0.7, 1)), save(tmp_path / "b", drawn(0.9, 2, lost=60))
    found = compare_adapters(a, b)
    assert {g["name"]: g["verdict"] for g in found["gates"]} == dict.fromkeys(
        [
            "gain",
            "recall kept",
            "precision kept",
            "recall",
            "precision",
            "leaks",
            "frozen",
            "effect",
        ],
        "pass",
    ) | {"retention": "fail"}
    kept = next(gate for gate in found["gates"] if gate["name"] == "retention")
    assert "; a reaches 1.000." in kept["why"]
    assert kept["rule"] == "accuracy on general questions at most 0.03 below a"
    assert found["verdict"] == "fail"


def versions(
    found: tuple[int, int, int, int], alarms: tuple[int, int]
) -> tuple[list[Item], list[Item]]:
    """Items of A and B: positives found by both, A alone, B alone and neither; false alarms."""
    both, first, second, neither = found
    predicted = [(1, 1, 1)] * both + [(1, 1, 0)] * first + [(1, 0, 1)] * second
    predicted += [(1, 0, 0)] * neither
    predicted += [(0, int(n < alarms[0]), int(n < alarms[1])) for n in range(290)]
    made: tuple[list[Item], list[Item]] = ([], [])
    for n, (target, *answers) in enumerate(predicted):
        for items, answer in zip(made, answers, strict=True):
            item = item_row(target, number=n, base=0, adapter=answer)
            items.append(item | {"digest": f"digest {n}"})
    knowledge = [item | {"digest": f"question {n}"} for n, item in enumerate(general(300))]
    return made[0] + knowledge, made[1] + knowledge


def test_a_better_score_does_not_hide_that_fewer_positives_are_found(tmp_path: Path) -> None:
    """F1 rises by far, recall falls by .073 (at most -.007): no pass."""
    first, second = versions((74, 11, 4, 7), alarms=(60, 5))
    a, b = save(tmp_path / "a", first), save(tmp_path / "b", second)
    found = compare_adapters(a, b)
    assert {g["name"]: g["verdict"] for g in found["gates"]} == {
        "gain": "pass", "recall kept": "fail", "precision kept": "pass", "recall": "pass",
        "precision": "pass", "retention": "pass", "leaks": "pass", "frozen": "pass",
        "effect": "pass",
    }  # fmt: skip
    lost = next(gate for gate in found["gates"] if gate["name"] == "recall kept")
    assert (lost["observed"], lost["upper"]) == pytest.approx((-0.073, -0.007), abs=5e-4)
    assert lost["why"] == (
        "Recall 0.812; a reaches 0.885. The difference is -0.073, at most -0.007 with 95 % "
        "confidence: it clearly fell."
    )
    assert found["verdict"] == "fail"


def test_a_better_version_is_held_to_the_floors_of_the_first(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", drawn(0.5, 1)), save(tmp_path / "b", drawn(0.7, 2))
    card = Card.read(a)
    card.adapter.settings["gates"] |= {"recall": 0.8, "precision": 0.8}
    card.write(a)
    found = compare_adapters(a, b)
    floors = {g["name"]: g["verdict"] for g in found["gates"] if g["name"] in FLOORS}
    assert floors == {"recall": "fail", "precision": "fail"}
    assert next(g["verdict"] for g in found["gates"] if g["name"] == "gain") == "pass"
    assert found["verdict"] == "fail"


STANDING = {"test_set": "a" * 16, "number": 1, "budget": 5, "level": 0.99, "post_hoc": False,
            "declared_verdict": None, "recognised": True, "broken": None}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "gate", "expected"),
    [
        ({"evaluations": STANDING | {"number": 6}}, "evaluations", "inconclusive"),
        ({"evaluations": STANDING | {"post_hoc": True}}, "evaluations", "inconclusive"),
        ({"leaks": {"exact": 80, "near": 0, "pairs": []}}, "leaks", "fail"),
        ({"judged": {"base_changed": True}}, "frozen", "fail"),
        ({"judged": {"largest_move": 0.0}}, "effect", "fail"),
    ],
)
def test_a_better_version_passes_only_what_its_evaluation_would_pass(
    tmp_path: Path, changed: dict[str, Any], gate: str, expected: str
) -> None:
    a, b = save(tmp_path / "a", drawn(0.7, 1)), save(tmp_path / "b", drawn(0.9, 2))
    card = Card.read(b)
    for name, value in changed.items():
        setattr(card.adapter, name, card.adapter.judged | value if name == "judged" else value)
    card.write(b)
    found = compare_adapters(a, b)
    assert {g["name"]: g["verdict"] for g in found["gates"]}[gate] == expected
    assert found["verdict"] == expected
    assert compare_adapters(b, a)["verdict"] == "fail"  # what A did decides nothing


def test_a_better_version_passes_by_the_bounds_of_its_evaluation(tmp_path: Path) -> None:
    first, second = versions((80, 4, 12, 0), alarms=(5, 5))
    a, b = save(tmp_path / "a", first), save(tmp_path / "b", second)
    assert compare_adapters(a, b)["verdict"] == "pass"
    card = Card.read(b)
    card.adapter.evaluations = STANDING
    card.write(b)
    found = {g["name"]: g for g in compare_adapters(a, b)["gates"]}
    assert (found["gain"]["verdict"], found["evaluations"]["verdict"]) == ("inconclusive", "pass")
    assert "99 % bounds" in found["gain"]["why"]


def test_fewer_than_30_rows_compare_nothing(tmp_path: Path) -> None:
    first, second = versions((5, 0, 10, 0), alarms=(0, 0))
    few = [[*run[:25], *run[-300:]] for run in (first, second)]
    a, b = (save(tmp_path / name, run) for name, run in zip("ab", few, strict=True))
    assert compare_adapters(a, b)["verdict"] == "inconclusive"


def test_a_suite_that_was_lost_does_not_hide_among_the_others(tmp_path: Path) -> None:
    first, second = (drawn(right, seed) for right, seed in ((0.7, 1), (0.95, 2)))
    for items in (first, second):
        items += [
            item_row(0, "general", n, base=0, adapter=int(items is second and n < 28))
            | {"suite": "lost", "digest": f"lost {n}"} for n in range(40)
        ]  # fmt: skip
        items += [i | {"digest": f"more {n}"} for n, i in enumerate(general(3000))]
    a, b = save(tmp_path / "a", first), save(tmp_path / "b", second)
    found = compare_adapters(a, b)
    kept = next(gate for gate in found["gates"] if gate["name"] == "retention")
    assert kept["verdict"] == "fail"
    assert "Accuracy on lost 0.300; a reaches 1.000" in kept["why"]


def test_an_encoder_that_forgot_does_not_pass(tmp_path: Path) -> None:
    """What it knows is told by its nats on masked tokens, and by no question."""
    folders = []
    for name, right, rise in (("a", 0.7, 0.0), ("b", 0.9, 0.0), ("c", 0.9, 6.0)):
        items = [item for item in drawn(right, 2) if item["set"] == "test"]
        for n, item in enumerate(texts := text(200)):
            item["digest"] = f"text {n}"
            item["scores"]["adapter"]["nats"] += rise
        folders.append(save(tmp_path / name, [*items, *texts], knowledge="masked tokens"))
    a, kept, lost = folders
    found = [compare_adapters(a, other) for other in (kept, lost)]
    gates = [{g["name"]: g["verdict"] for g in one["gates"]}["retention"] for one in found]
    assert gates == ["pass", "fail"]
    assert [one["verdict"] for one in found] == ["pass", "fail"]


def test_general_texts_that_decide_nothing_may_differ(tmp_path: Path) -> None:
    """As where a base wrote its texts anew between two evaluations."""
    folders = []
    for name, right in (("a", 0.7), ("b", 0.9)):
        texts = [{**item, "digest": f"{name} {n}"} for n, item in enumerate(text(20))]
        folders.append(save(tmp_path / name, [*drawn(right, 2), *texts]))
    assert compare_adapters(*folders)["verdict"] == "pass"


def test_other_test_rows_or_another_task_are_refused(tmp_path: Path) -> None:
    a, items = save(tmp_path / "a", drawn(0.7, 1)), drawn(0.9, 2)
    fewer = save(tmp_path / "fewer", items[1:])
    with pytest.raises(AdapterError, match="399 items, 399 of them shared"):
        compare_adapters(a, fewer)
    relabelled = save(tmp_path / "relabelled", [items[0] | {"target": 1}, *items[1:]])
    with pytest.raises(AdapterError, match="399 of them shared"):
        compare_adapters(a, relabelled)
    elsewhere = save(tmp_path / "elsewhere", [i | {"digest": "x" + i["digest"]} for i in items])
    with pytest.raises(AdapterError, match="another key"):
        compare_adapters(a, elsewhere)
    other = save(tmp_path / "other", items, positive="no")
    with pytest.raises(AdapterError, match=r"the same positive .*the same --metric and"):
        compare_adapters(a, other)
    card = Card.read(a)
    card.adapter.judged = {}
    card.write(a)
    with pytest.raises(AdapterError, match="that was evaluated"):
        compare_adapters(a, fewer)


def test_seeds_of_one_domain(tmp_path: Path) -> None:
    rights = (0.80, 0.85, 0.90, 0.95)
    folders = [save(tmp_path / f"s{n}", drawn(r, n)) for n, r in enumerate(rights)]
    rows, found = compare_seeds(folders)
    assert rows == "test"
    assert found.keys() >= {"accuracy", "f1", "loss"}
    accuracy = found["accuracy"]
    assert accuracy["runs"] == 4
    assert accuracy["each"] == pytest.approx([r - 0.5 for r in rights], abs=0.05)
    assert accuracy["sd_seed"] == pytest.approx(np.std(rights, ddof=1), abs=0.02)
    for one, folder in zip(found["f1"]["each"], folders, strict=True):
        alone = compare_adapters(folder, folder)["scores"]["f1"]["base"]
        assert one == pytest.approx(alone)  # the base's F1 is 0
    with pytest.raises(AdapterError, match="the same test items"):
        compare_seeds([folders[0], save(tmp_path / "fewer", drawn(0.9, 9)[1:])])


def test_seeds_are_compared_on_validation_rows_without_an_evaluation(tmp_path: Path) -> None:
    folders = []
    for n, right in enumerate((0.8, 0.9)):
        # Two adapters were never evaluated; the third has test rows too, which are left alone.
        items = [i | {"set": "validation"} for i in drawn(right, n) if i["set"] == "test"]
        folders.append(save(tmp_path / f"s{n}", items))
        card = Card.read(folders[-1])
        card.adapter.judged = {}
        card.adapter.settings["task"]["labels"] = ["no", "yes"]
        card.write(folders[-1])
    validation = [i | {"set": "validation"} for i in drawn(0.85, 2) if i["set"] == "test"]
    folders.append(save(tmp_path / "s2", [*validation, *drawn(0.2, 3)]))
    rows, found = compare_seeds(folders)
    assert rows == "validation"
    assert found["accuracy"]["each"] == pytest.approx([0.3, 0.4, 0.35], abs=0.05)
    assert found["f1"]["n"] == 400
    # Without validation rows of all, an adapter that was not evaluated has nothing to compare.
    with pytest.raises(AdapterError, match="scores on validation rows"):
        compare_seeds([folders[0], save(tmp_path / "tested", drawn(0.9, 9))])


def test_the_command_and_its_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", drawn(0.7, 1))
    save(tmp_path / "b", drawn(0.9, 2))
    for names, code in ((("a", "b"), 0), (("b", "a"), 1), (("a", "a"), 3), (("a", "bb"), 2)):
        assert run("compare", *names, "--out", str(tmp_path)) == code, names
    captured = capsys.readouterr()
    assert "b against a on the same 400 rows" in captured.out
    assert "; a reaches 0." in captured.out
    assert "Did you mean 'b'" in captured.err
    assert run("compare", "a", "b", "--json", "--out", str(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"


def test_the_seeds_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        save(tmp_path / f"s{n}", drawn(0.8 + n / 20, n))
    assert run("compare", "s0", "s1", "s2", "--out", str(tmp_path)) == 0
    assert "3 seeds on the same 400 test rows" in capsys.readouterr().out
    assert not Card.read(tmp_path / "s0").adapter.seeds
    assert run("compare", "--seeds", "s0", "s1", "--json", "--save", "--out", str(tmp_path)) == 0
    found = json.loads(capsys.readouterr().out)["seeds"]
    assert found["f1"]["runs"] == 2
    for name in ("s0", "s1"):
        assert Card.read(tmp_path / name).adapter.seeds == found
    assert {p.name for p in (tmp_path / "s0").iterdir()} == {"card.json", "items.jsonl"}
    assert run("compare", "s0", "--out", str(tmp_path)) == 2
    assert "several seeds" in capsys.readouterr().err


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    folders = [save(tmp_path / n, drawn(0.7, 1, 40)) for n in "ab"]
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from lora_domains.analysis.compare import compare_adapters\n"
        f"compare_adapters(*map(Path, {[str(f) for f in folders]!r}))\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
