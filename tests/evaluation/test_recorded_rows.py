"""What the ledger of a project records: which rows are the same, its folder and its key."""

import json
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import model_in

from lora_domains.data.identity import (
    FOLDER,
    KEY_VARIABLE,
    PROJECT_VARIABLE,
    project_folder,
    project_key,
)
from lora_domains.data.source import Data
from lora_domains.domain import Domain, Gates, with_settings
from lora_domains.errors import AdapterError
from lora_domains.evaluation.verdict_run import Evaluated, declaration
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification, Generation, MultipleChoice
from lora_domains.verdict.ledger import LEDGER, Standing

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("out"), tiny_base)


def titled(count: int = 160) -> Rows:
    """Rows with a title that several share."""
    return [row | {"title": f"note {n % 9}"} for n, row in enumerate(make_rows(count))]


def declared(
    rows: Rows, test: Rows | None = None, name: str = "spam", limit: int | None = None,
    **task: Any,
) -> Domain:  # fmt: skip
    """A domain whose test rows are given, or else taken from the training rows."""
    return Domain(name, Classification(**task), Data(rows, None, test, limit=limit))


def evaluate(
    model: DomainModel, domain: Domain, adapter: str, verdict: str = "fail", out: str = "out"
) -> Standing:
    evaluated = Evaluated(model.dataset(domain), adapter, Path(out))
    found = evaluated.begin()
    evaluated.end(verdict)
    return found


ROWS = titled()
TRAIN, TEST = ROWS[:100], ROWS[100:]
SAME: dict[str, Callable[[], Domain]] = {
    "prompt": lambda: declared(TRAIN, TEST, prompt="Is this spam? {text}\nlabel:"),
    "prompt with a title": lambda: declared(TRAIN, TEST, text=("title", "text")),
    "head": lambda: declared(TRAIN, TEST, head=True),
    "label order": lambda: declared(TRAIN, TEST, labels=("spam", "ham")),
    "positive class": lambda: declared(TRAIN, TEST, positive="spam"),
    "wording": lambda: declared(TRAIN, TEST, wording={"spam": "bad", "ham": "fine"}),
    "file order": lambda: declared(TRAIN, TEST[::-1]),
    "trailing space": lambda: declared(TRAIN, [r | {"text": r["text"] + " "} for r in TEST]),
    "capitals": lambda: declared(TRAIN, [r | {"text": r["text"].upper()} for r in TEST]),
    "another column": lambda: declared(TRAIN, [r | {"ward": "north"} for r in TEST]),
    "one row less": lambda: declared(TRAIN, TEST[1:]),
    "rows added": lambda: declared(TRAIN[60:], [*TEST, *TRAIN[:60]]),
    "a sample": lambda: declared(TRAIN, TEST, limit=20),
    "training rows": lambda: declared(TRAIN[40:], TEST),
    "another domain": lambda: declared(TRAIN, TEST, "mail"),
    "generation": lambda: Domain(
        "answers", Generation("text", "label", max_new_tokens=4), Data(TRAIN, None, TEST)
    ),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_rows_are_recognised_whatever_else_changes(
    model: DomainModel, change: str
) -> None:
    assert evaluate(model, declared(TRAIN, TEST), "a").number == 1
    assert evaluate(model, SAME[change](), "b", out="elsewhere").number == 2


@pytest.mark.parametrize("seeds", [(0, 1), (3, 0)])
def test_rows_that_a_seed_takes_from_the_training_rows_are_one_test_set(
    model: DomainModel, seeds: tuple[int, int]
) -> None:
    one, two = (with_settings(declared(ROWS), seed=seed) for seed in seeds)
    assert {r.example.id for r in model.dataset(one).test} != {
        r.example.id for r in model.dataset(two).test
    }
    assert evaluate(model, one, "a").number == 1
    assert evaluate(model, two, "b").number == 2
    # The same bytes on other rows of it are charged as well.
    assert evaluate(model, two, "a").number == 3
    # So are the test rows in a file of their own.
    assert evaluate(model, declared(TRAIN, TEST), "c").number == 4


def test_other_rows_and_other_labels_are_another_test_set(model: DomainModel) -> None:
    evaluate(model, declared(TRAIN, TEST), "a")
    assert evaluate(model, declared(TRAIN[:50], TRAIN[50:]), "b").number == 1
    swapped = [r | {"label": "ham" if r["label"] == "spam" else "spam"} for r in TEST]
    assert evaluate(model, declared(TRAIN, swapped), "c").number == 1


def test_questions_with_one_wording_are_told_apart_by_their_choices(model: DomainModel) -> None:
    def questions(first: int) -> Rows:
        return [
            {"question": "Which is true?", "choices": [f"red {n}", f"blue {n}"], "answer": n % 2}
            for n in range(first, first + 40)
        ]

    def quiz(test: Rows) -> Domain:
        return Domain("quiz", MultipleChoice(), Data(questions(500), None, test))

    turned = [r | {"choices": r["choices"][::-1], "answer": 1 - r["answer"]} for r in questions(0)]
    assert evaluate(model, quiz(questions(0)), "a").number == 1
    assert evaluate(model, quiz(turned), "b").number == 2
    assert evaluate(model, quiz(questions(100)), "c").number == 1


def test_gates_metric_and_groups_are_declared_by_the_first_evaluation(model: DomainModel) -> None:
    made = declared(TRAIN, TEST, positive="spam")
    assert not evaluate(model, made, "a").post_hoc
    for changed in (
        replace(made, gates=Gates(overfit=0.9, drift=5)),
        replace(made, task=replace(made.task, positive="ham")),
        replace(made, task=replace(made.task, target_recall=0.9)),
        replace(made, data=replace(made.data, slices=("title",))),
        replace(made, data=replace(made.data, group="title")),
    ):
        later = evaluate(model, changed, "a", "pass")
        assert (later.number, later.post_hoc, later.may_pass) == (1, True, False)
    # The number of evaluations is fixed by the test set.
    more = evaluate(model, replace(made, gates=Gates(evaluations=50)), "a")
    assert (more.post_hoc, more.budget) == (False, 5)


def test_a_gate_at_its_default_is_not_part_of_the_declaration() -> None:
    made = declared(TRAIN, TEST)
    assert declaration(made) == declaration(replace(made, gates=Gates(drift=Gates().drift)))
    assert declaration(made) != declaration(replace(made, gates=Gates(drift=0.5)))
    # A domain read from a card has the floor that its target set.
    aimed = replace(made, task=Classification(positive="spam", target_recall=0.9))
    assert declaration(aimed) == declaration(replace(aimed, gates=Gates(recall=0.9)))
    assert declaration(aimed) != declaration(replace(aimed, gates=Gates(recall=0.7)))


# ── The folder and the key ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("marker", [".git", "pyproject.toml", None])
def test_the_project_is_the_nearest_folder_with_a_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str | None
) -> None:
    monkeypatch.delenv(PROJECT_VARIABLE)
    inner = tmp_path / "project" / "work"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    if marker:
        (tmp_path / "project" / marker).mkdir()
    outside = any((folder / m).exists() for folder in tmp_path.parents for m in (".git",))
    assert not outside
    assert project_folder() == (tmp_path / "project" if marker else inner)


def test_the_ledger_holds_no_text_and_git_ignores_its_key(
    model: DomainModel, project: Path
) -> None:
    evaluate(model, declared(TRAIN, TEST), "a")
    folder = project / FOLDER
    names = {"evaluations.jsonl", "evaluations.head", "key", ".gitignore", ".gitattributes"}
    assert {path.name for path in folder.iterdir()} == names
    assert not any(row["text"] in (folder / LEDGER).read_text() for row in TEST)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=project, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert {Path(path).name for path in listed} == names - {"key"}
    # Nobody can confirm a guess of a row without the key.
    rows = json.loads((folder / LEDGER).read_text().splitlines()[0])["rows"].split()
    (folder / "key").unlink()
    (folder / LEDGER).unlink()
    evaluate(model, declared(TRAIN, TEST), "a")
    others = json.loads((folder / LEDGER).read_text().splitlines()[0])["rows"].split()
    assert not set(rows) & set(others)


def test_a_ledger_without_its_key_is_inconclusive(
    model: DomainModel, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(model, declared(TRAIN, TEST), "a")
    key = project / FOLDER / "key"
    text = key.read_text()
    key.unlink()
    found = evaluate(model, declared(TRAIN, TEST), "b")
    assert (found.recognised, found.may_pass, key.exists()) == (False, False, False)
    # As in CI, where the key is a secret.
    monkeypatch.setenv(KEY_VARIABLE, text)
    assert evaluate(model, declared(TRAIN, TEST), "b").number == 2
    monkeypatch.setenv(KEY_VARIABLE, "ab" * 32)
    assert not evaluate(model, declared(TRAIN, TEST), "c").recognised
    monkeypatch.setenv(KEY_VARIABLE, "no key")
    with pytest.raises(AdapterError, match="a key of 32 bytes") as raised:
        project_key(project / FOLDER, known=True)
    assert raised.value.where == KEY_VARIABLE


def test_the_ledger_of_an_older_version_is_refused(model: DomainModel, tmp_path: Path) -> None:
    (tmp_path / ".looks.jsonl").write_text('{"look": 1}\n')
    with pytest.raises(AdapterError, match="one of an older version"):
        evaluate(model, declared(TRAIN, TEST), "a", out=str(tmp_path))
