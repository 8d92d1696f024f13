"""What the ledger of a project records: which rows are the same, its folder and its key."""

import json
import random
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import make_rows
from support.models import SUITE, model_in

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
from lora_domains.evaluation.verdict_run import Evaluated, declaration, declared_by
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Suite, embedded, facts, load_suite, quick
from lora_domains.report.card import AdapterEntry
from lora_domains.tasks import Classification, Generation, MultipleChoice, Task
from lora_domains.verdict.ledger import LEDGER, Standing

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("out"), tiny_base)


def titled(count: int = 160) -> Rows:
    """Rows with a title that several share."""
    return [row | {"title": f"note {n % 9}"} for n, row in enumerate(make_rows(count))]


def declared(
    rows: Rows | None, test: Rows | None = None, name: str = "spam", limit: int | None = None,
    **task: Any,
) -> Domain:  # fmt: skip
    """A domain whose test rows are given, or else taken from the training rows."""
    return Domain(name, Classification(**task), Data(rows, None, test, limit=limit))


def evaluate(
    model: DomainModel, domain: Domain, adapter: str, verdict: str = "fail", out: str = "out",
    suite: Suite = SUITE, elsewhere: bool = False,
) -> Standing:  # fmt: skip
    entry = AdapterEntry(
        domain=domain.name, path=domain.name, sha256=adapter, trained_elsewhere=elsewhere
    )
    evaluated = Evaluated(model.dataset(domain), entry, suite, model.base, Path(out))
    found = evaluated.begin()
    evaluated.end(verdict)
    return found


def row_function(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Domain:
    made = declared(TRAIN, TEST)
    return replace(made, data=replace(made.data, row=lambda row: {**row, **change(dict(row))}))


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
    "row function": lambda: row_function(lambda row: {"text": f"Note: {row['text']}"}),
    "joined by a row function": lambda: row_function(
        lambda row: {"text": f"{row['title']}. {row['text']}"}
    ),
    "label of a row function": lambda: row_function(lambda row: {"label": "is " + row["label"]}),
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


def worded(first: int, count: int, words: int = 7) -> Rows:
    """Rows of several texts: a subject and a body; three hypotheses to each premise."""
    draw = random.Random(first)

    def text(length: int) -> str:
        return " ".join(draw.choice(["red", "stone", "river", "house", "cloud", "table"]) for _ in
                        range(length)) + f" {draw.random()}"  # fmt: skip

    rows: Rows = []
    for n in range(count):
        premise = rows[-1]["premise"] if n % 3 else text(2 * words)
        rows.append({"subject": text(words), "body": text(30), "premise": premise,
                     "hypothesis": text(words), "number": n, "label": n % 2})  # fmt: skip
    return rows


MAILS = worded(0, 120)


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        (("subject", ("subject", "body")), MAILS),
        (("body", "subject"), MAILS),
        (("subject", "body"), MAILS),
        ((("premise", "hypothesis"), ("premise", "hypothesis")), MAILS[::2]),
        ((("premise", "hypothesis"), "hypothesis"), MAILS[::5]),
        (("subject", "subject"), [row | {"label": float(row["label"])} for row in MAILS]),
        (("subject", "subject"), [row | {"label": bool(row["label"])} for row in MAILS]),
    ],
)
def test_rows_are_the_same_by_any_of_their_texts_and_any_form_of_their_label(
    model: DomainModel, texts: tuple[Any, Any], rows: Rows
) -> None:
    train = worded(1, 60)
    same_form = [row | {"label": type(rows[0]["label"])(row["label"])} for row in train]
    only = {"premise", "hypothesis", "label"} if "premise" in texts[0] else {*MAILS[0]}
    first, second = ([{k: row[k] for k in only} for row in part] for part in (MAILS, rows))
    assert evaluate(model, declared(train, first, text=texts[0]), "a").number == 1
    assert evaluate(model, declared(same_form, second, text=texts[1]), "b").number == 2


@pytest.mark.parametrize("texts", ["subject", ("premise", "hypothesis"), ("number", "subject")])
def test_new_rows_are_new_though_they_share_numbers_and_categories(
    model: DomainModel, texts: Any
) -> None:
    train, new = worded(1, 60), worded(2, 120)
    evaluate(model, declared(train, MAILS, text=texts), "a")
    assert evaluate(model, declared(train, new, text=texts), "b").number == 1


def test_rows_of_categories_are_known_by_all_of_their_columns(model: DomainModel) -> None:
    def table(seed: int) -> Rows:
        draw = random.Random(seed)
        return [{f"column {n}": f"kind {draw.randrange(6)}" for n in range(6)} |
                {"label": draw.randrange(2)} for _ in range(80)]  # fmt: skip

    columns = tuple(f"column {n}" for n in range(6))
    for adapter, seed, number in (("a", 0, 1), ("b", 1, 1), ("c", 0, 2)):
        made = declared(table(2), table(seed), text=columns)
        assert evaluate(model, made, adapter).number == number


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


@pytest.mark.parametrize("elsewhere", [False, True])
def test_suite_and_rows_of_training_are_declared_and_prompts_are_charged(
    model: DomainModel, elsewhere: bool
) -> None:
    made = declared(None, TEST, positive="spam")

    def again(train: Rows | None, **task: Any) -> Standing:
        data = replace(made.data, train=train, validation=ROWS[80:100], drop_leaks=True)
        changed = replace(made, data=data, task=replace(made.task, **task))
        return evaluate(model, changed, "a", elsewhere=elsewhere)

    assert again(None).number == 1
    assert not again(TRAIN[:80]).post_hoc  # added: leaks and baselines can be measured now
    found = [again(None), again(TRAIN[:70]), again([*TRAIN[:80], *TEST[:5]])]
    # Those of an adapter that was trained here are compared with its card.
    assert [one.post_hoc for one in found] == [elsewhere] * 3
    assert found[0].changed == ("training rows, all training rows" if elsewhere else "")
    assert again(TRAIN[:80], prompt="{text} is it spam?").number == 2
    assert again(TRAIN[:80]).number == 1


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (
            Classification(chat=True),
            [{"instruction": "Is it spam?"}, {"instruction": "Spam or ham?"}, {"chat": False}],
        ),
        (
            Generation(text="text", answer="label"),
            [{"judge": "number"}, {"until": "."}, {"max_new_tokens": 3}, {"instruction": "Say."}],
        ),
    ],
)
def test_other_instructions_and_readings_of_an_answer_are_charged(
    model: DomainModel, task: Task, changes: list[dict[str, Any]]
) -> None:
    made = Domain("spam", task, Data(TRAIN, None, TEST))
    tried = [made, *(replace(made, task=replace(task, **change)) for change in changes), made]
    found = [evaluate(model, domain, "a").number for domain in tried]
    assert found == [*range(1, len(tried)), 1]


def test_general_text_that_was_searched_for_leaks_stays_declared(model: DomainModel) -> None:
    made = declared(TRAIN, TEST)
    texts = [{"text": f"river {n} of a cloud"} for n in range(30)]
    own = replace(made, data=replace(made.data, general=texts))
    fewer = replace(made, data=replace(made.data, general=texts[1:]))
    found = [evaluate(model, domain, "a").changed for domain in (made, own, own, fewer, made)]
    assert found == ["", "", "", "general text", "general text"]


def test_a_larger_suite_is_charged_and_another_one_is_post_hoc(model: DomainModel) -> None:
    made = declared(TRAIN, TEST)
    assert evaluate(model, made, "a", suite=quick()).number == 1
    more = evaluate(model, made, "a", suite=embedded())
    assert (more.number, more.post_hoc) == (2, False)
    for suite in (quick(), SUITE):
        later = evaluate(model, made, "a", suite=suite)
        assert (later.number, later.post_hoc) == (2, True)


def test_a_sample_of_the_training_rows_is_no_change_of_them(
    model: DomainModel, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in worded(3, 1200)))

    def again(limit: int | None) -> Standing:
        made = declared(None, MAILS, text="subject")
        made = replace(made, data=replace(made.data, train=str(path), limit=limit))
        return evaluate(model, made, "a", elsewhere=True)

    assert [again(limit).changed for limit in (20, 40, None, 20)] == [
        "",
        "",
        "",
        "all training rows",
    ]


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


def test_the_ledger_holds_no_text_and_git_ignores_its_key_and_its_lock(
    model: DomainModel, project: Path
) -> None:
    evaluate(model, declared(TRAIN, TEST), "a")
    folder = project / FOLDER
    shared = {"evaluations.jsonl", "evaluations.head", ".gitignore", ".gitattributes"}
    names = {path.name for path in folder.iterdir()}
    assert names == shared | {"key", ".evaluations.jsonl.lock"}
    assert not any(row["text"] in (folder / LEDGER).read_text() for row in TEST)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=project, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert {Path(path).name for path in listed} == shared
    # Nobody can confirm a guess of a row without the key.
    rows = " ".join(json.loads((folder / LEDGER).read_text().splitlines()[0])["rows"]).split()
    (folder / "key").unlink()
    (folder / LEDGER).unlink()
    evaluate(model, declared(TRAIN, TEST), "a")
    others = " ".join(json.loads((folder / LEDGER).read_text().splitlines()[0])["rows"]).split()
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


def test_other_questions_in_a_file_of_one_name_are_a_change(
    model: DomainModel, tmp_path: Path
) -> None:
    dataset, found = model.dataset(declared(TRAIN, TEST, positive="spam")), []
    entry = cast(Any, SimpleNamespace(trained_elsewhere=False))
    for answer in (0, 1):
        rows = [{"question": f"q{n}", "choices": ["a", "b"], "answer": answer} for n in range(9)]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        suite = load_suite(tmp_path / "own.jsonl")
        found.append(declared_by(dataset, suite, model.base, entry))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"questions of a file"}
    assert "questions of a file" not in declared_by(dataset, facts(), model.base, entry)
