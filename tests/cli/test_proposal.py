"""What is proposed for rows by what their columns hold, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import run
from support.hospital import SECRET, table, visits

from lora_domains.cli.columns import columns_of
from lora_domains.cli.flags import add_run_flags
from lora_domains.cli.parser import Parser
from lora_domains.cli.proposal import Proposal, proposed
from lora_domains.data.readers import read
from lora_domains.errors import DataError, UsageError
from lora_domains.tasks import (
    Chat,
    Classification,
    Generation,
    LanguageModelling,
    MultiLabel,
    MultipleChoice,
    Number,
    Preference,
    Task,
)


def proposal(folder: Path, rows: list[dict[str, Any]], *flags: str) -> Proposal:
    parser = Parser()
    add_run_flags(parser, recipe=False)
    return proposed(parser.read(["--train", table(folder / "rows.csv", rows), *flags]))


def test_the_columns_of_a_hospital(tmp_path: Path) -> None:
    held = columns_of(read(table(tmp_path / "rows.csv", visits()), "train"))
    assert {name: column.holds for name, column in held.items()} == {
        "Fallnr": "ids", "PatID": "ids", "Aufnahme": "dates", "Geschlecht": "categories",
        "Alter": "numbers", "ICD": "categories", "Notiz": "free text", "Bemerkung": "nothing",
        "Dringlich": "categories",
    }  # fmt: skip
    assert [name for name, column in held.items() if column.repeats] == ["PatID"]


def test_columns_are_proposed_by_what_they_hold(tmp_path: Path) -> None:
    found = proposal(tmp_path, visits())
    assert found.domain.task == Classification("Notiz", "Dringlich", positive="ja")
    assert found.domain.data.group == "PatID"
    assert found.reasons.keys() == {"task", "text", "label", "positive", "group"}
    assert "; other candidates: ICD, " in found.reasons["label"]
    assert "'ja', the label of 18 % of the rows" in found.reasons["positive"]
    assert SECRET not in str(found.reasons)


def test_an_attribute_of_the_person_comes_after_what_the_text_hardly_tells(tmp_path: Path) -> None:
    rows = [row | {"Dringlich": "ja" if n % 3 else "nein"} for n, row in enumerate(visits())]
    assert proposal(tmp_path, rows).domain.task.answer_column in ("Dringlich", "ICD")
    topics = [{key: row[key] for key in ("Geschlecht", "Notiz", "ICD")} | {"themen": "a;b" if n % 3
              else "b"} for n, row in enumerate(visits())]  # fmt: skip
    assert proposal(tmp_path, topics).domain.task == MultiLabel("Notiz", "themen")


def test_flags_decide_before_the_proposal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = visits()
    found = proposal(tmp_path, rows, "--label", "ICD", "--group", "Fallnr")
    assert found.domain.task == Classification("Notiz", "ICD")
    assert found.domain.data.group == "Fallnr"
    assert found.reasons.keys() == {"task", "text"}
    both = proposal(tmp_path, rows, "--text", "Notiz", "--label", "Dringlich")
    assert both.domain.task == Classification("Notiz", "Dringlich")
    assert (both.domain.data.group, both.reasons) == (None, {})
    assert "Keep them together: --group PatID" in capsys.readouterr().out
    proposal(tmp_path, rows, "--text", "Notiz", "--label", "Dringlich", "--group", "Fallnr")
    assert capsys.readouterr().out == ""
    text = proposal(tmp_path, rows, "--text", "Notiz,Alter", "--positive", "none")
    assert text.domain.task == Classification(("Notiz", "Alter"), "Dringlich")
    number = proposal(tmp_path, rows, "--task", "number", "--label", "Alter")
    assert number.domain.task == Number("Notiz", "Alter")


ROWS = make_rows(60)
KINDS: dict[str, tuple[list[dict[str, Any]], Task]] = {
    "several labels": (
        [{"note": row["text"], "parts": "pump;valve" if n % 2 else "valve"}
         for n, row in enumerate(ROWS)], MultiLabel("note", "parts"),
    ),
    "numbers": (
        [{"no": n, "note": row["text"], "price": f"{n / 7:.2f}".replace(".", ",")}
         for n, row in enumerate(ROWS)], Number("note", "price", decimal=","),
    ),
    "answers": (
        [{"Frage": row["text"], "Antwort": f"it is {row['text']}"} for row in ROWS],
        Generation("Frage", "Antwort"),
    ),
    "texts alone": ([{"line": row["text"]} for row in ROWS], LanguageModelling("line")),
    "usual names": ([row | {"who": n // 2} for n, row in enumerate(ROWS)], Classification()),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "task"), KINDS.values(), ids=KINDS)
def test_the_kind_follows_from_the_columns(
    rows: list[dict[str, Any]], task: Task, tmp_path: Path
) -> None:
    assert proposal(tmp_path, rows).domain.task == task


def test_messages_under_any_name_are_a_chat(tmp_path: Path) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path.write_text("".join(json.dumps({"n": n, "dialog": turns}) + "\n" for n in range(30)))
    parser = Parser()
    add_run_flags(parser, recipe=False)
    assert proposed(parser.read(["--train", str(path)])).domain.task == Chat("dialog")


def test_what_cannot_be_proposed_is_said(tmp_path: Path) -> None:
    rows = [{"id": 70 + n, "note": f"{row['text']} {SECRET}"} for n, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=r"labels, numbers or answers; found columns 'id' \(ids\)"):
        proposal(tmp_path, rows)
    headless = [{f"{SECRET} one": row["text"], "spam": row["label"]} for row in ROWS]
    with pytest.raises(DataError, match="2 names that look like the cells of a row") as caught:
        proposal(tmp_path, headless)
    assert SECRET not in str(caught.value)


def test_a_head_on_conversations_is_refused_by_its_flag(tmp_path: Path) -> None:
    rows = [{"instruction": row["text"], "output": row["label"]} for row in ROWS]
    with pytest.raises(UsageError, match=r"^--head: expected labels or numbers.* rows of a chat"):
        proposal(tmp_path, rows, "--head")


def test_fit_says_what_it_proposes(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table(tmp_path / "visits.csv", visits())
    assert run("fit", rows, "--base", str(tiny_base), "--dry-run", "--retention", "none") == 0
    shown = capsys.readouterr().out
    for part in ("task  ", "text  ", "label  ", "positive  ", "group  ", "groups whole"):
        assert part in shown
    assert SECRET not in shown


def long(n: int, seed: int) -> str:
    """Some words that no other row has."""
    return " ".join(f"w{(n * k + seed) % 97}" for k in range(12))


@pytest.mark.parametrize(("columns", "task"), [
    (("context", "question", "answer"), Generation(("context", "question"), "answer")),
    (("Context", "Question", "Answer"), Generation(("Context", "Question"), "Answer")),
    (("Instruction", "Input", "Output"), Chat(user=("Instruction", "Input"), assistant="Output")),
    (("note", "query", "completion"), Generation("query", "completion")),
    (("question", "A", "B", "C", "D", "answer"),
     MultipleChoice(choices=("A", "B", "C", "D"))),
    (("system_prompt", "question", "response"),
     Chat(user=("question",), assistant="response", system="system_prompt")),
])  # fmt: skip
def test_usual_names_of_questions_and_answers(
    columns: tuple[str, ...], task: Task, tmp_path: Path
) -> None:
    """Whatever their case, and however long the texts in them are."""
    rows = [
        {name: long(n, at) * (4 if at == 0 else 1) for at, name in enumerate(columns)}
        for n in range(60)
    ]
    assert proposal(tmp_path, rows).domain.task == task


def test_a_question_about_a_text_is_read_with_it_in_a_chat(tmp_path: Path) -> None:
    rows = [{"context": long(n, 1) * 4, "question": long(n, 2), "answer": long(n, 3)}
            for n in range(60)]  # fmt: skip
    found = proposal(tmp_path, rows, "--task", "chat").domain.task
    assert found == Chat(user=("context", "question"), assistant="answer")


@pytest.mark.parametrize(("more", "message"), [
    ({"label": [True, False]}, "'label' that says which answers are good"),
    ({"kto_tag": ["true", "False"]}, "'kto_tag' that says which answers are good"),
    ({"rejected_response": ["so", "no"]}, "'rejected_response' of rejected answers"),
])  # fmt: skip
def test_bad_answers_are_not_learned(
    more: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    rows = [{"prompt": long(n, 1), "completion": long(n, 2)}
            | {name: cells[n % 2] for name, cells in more.items()} for n in range(60)]  # fmt: skip
    with pytest.raises(DataError, match=message) as caught:
        proposal(tmp_path, rows)
    assert "w1" not in str(caught.value)
    named = proposal(tmp_path, rows, "--task", "chat", "--text", "prompt", "--label", "completion")
    assert named.domain.task == Chat(user="prompt", assistant="completion")
    other = [row | {"label": "a" if n % 2 else "b"} for n, row in enumerate(rows)]
    if "label" in more:
        assert proposal(tmp_path, other).domain.task.kind == "chat"


def test_a_chat_learns_the_chosen_answers_of_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": long(n, 1), "chosen": long(n, 2), "rejected": long(n, 3)}
            for n in range(60)]  # fmt: skip
    assert proposal(tmp_path, rows).domain.task == Preference()
    asked = {kind: proposal(tmp_path, rows, "--task", kind).domain.task
             for kind in ("chat", "generation")}  # fmt: skip
    assert asked["chat"] == Chat(user="prompt", assistant="chosen")
    assert asked["generation"] == Generation("prompt", "chosen")
    longer = [row | {"about": "x", "rejected": 3 * row["rejected"]} for row in rows]
    for kind in ("chat", "generation"):
        both = proposal(tmp_path, longer, "--task", kind, "--text", "about,prompt").domain.task
        assert (*both.input_columns, both.answer_column) == ("about", "prompt", "chosen")
        with pytest.raises(DataError, match="'rejected' of rejected answers"):
            proposal(tmp_path, rows, "--task", kind, "--label", "rejected")
    bare = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    with pytest.raises(DataError, match="'rejected' of rejected answers"):
        proposal(tmp_path, bare, "--task", "generation")  # there is no text that asks
    named = ("--text", "prompt", "--label", "rejected")
    assert proposal(tmp_path, rows, "--task", "chat", *named).domain.task.answer_column


def test_chosen_answers_in_messages_are_chats(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": long(n, 1)}, {"role": "assistant", "content": long(n, 2)}]
             for n in range(60)]  # fmt: skip
    path.write_text("\n".join(json.dumps({"chosen": t, "rejected": t[:1]}) for t in turns))
    parser = Parser()
    add_run_flags(parser, recipe=False)
    found = proposed(parser.read(["--train", str(path), "--task", "chat"])).domain.task
    assert found == Chat(messages="chosen")
    rows = [{"prompt": t[0]["content"], "chosen": t, "rejected": t[:1]} for t in turns]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="found messages"):
        proposed(parser.read(["--train", str(path), "--task", "generation"]))


@pytest.mark.parametrize(("columns", "flags", "text"), [
    ({"prompt": "long", "response": "longest", "helpfulness": "label"},
     ("--task", "classification"), "response"),
    ({"question": "long", "answer": "longest", "score": "number"}, ("--task", "number"), "answer"),
    ({"query": "long", "document": "longest", "output": "label"}, (), "document"),
    ({"instruction": "long", "input": "longest", "output": "label"},
     ("--task", "classification"), ("instruction", "input")),
])  # fmt: skip
def test_a_question_is_read_alone_only_where_nothing_else_is_text(
    columns: dict[str, str], flags: tuple[str, ...], text: str | tuple[str, ...], tmp_path: Path
) -> None:
    cells = {"long": lambda n: long(n, 1), "longest": lambda n: 3 * (long(n, 2) + " "),
             "label": lambda n: "ab"[n % 2], "number": lambda n: n / 7}  # fmt: skip
    rows = [{name: cells[kind](n) for name, kind in columns.items()} for n in range(60)]
    found = proposal(tmp_path, rows, *flags)
    assert (*found.domain.task.input_columns,) == (text if isinstance(text, tuple) else (text,))
    unread = {"query", "prompt", "question"} & {*columns}
    assert all(f"not read: {name}" in found.reasons["text"] for name in unread)


def test_several_answers_to_a_question_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(60):
            answers = {"text": [long(n, 3)], "answer_start": [1]}
            json.dump({"context": long(n, 1), "question": long(n, 2), "answers": answers}, file)
            file.write("\n")
    parser = Parser()
    add_run_flags(parser, recipe=False)
    with pytest.raises(DataError, match="a column of one answer each"):
        proposed(parser.read(["--train", str(path)]))


def test_conversations_as_json_in_a_table(tmp_path: Path) -> None:
    rows = [{"n": n, "dialogue": json.dumps([{"role": "user", "content": long(n, 1)},
                                             {"role": "assistant", "content": long(n, 2)}])}
            for n in range(60)]  # fmt: skip
    assert proposal(tmp_path, rows).domain.task == Chat(messages="dialogue")


@pytest.mark.parametrize("name", ["Kunden-Nr.", "Patient No.", "Vertragsnr", "ID Kunde"])
def test_whose_a_row_is_is_told_by_any_usual_name(name: str, tmp_path: Path) -> None:
    rows = [{name: f"x{n // 3}", "text": long(n, 1), "label": "a" if n % 2 else "b"}
            for n in range(90)]  # fmt: skip
    assert proposal(tmp_path, rows).domain.data.group == name


def test_a_cell_that_is_no_number_is_named(tmp_path: Path) -> None:
    rows = [{"text": long(n, 1), "Price": "N/A" if n == 7 else f"{100 + n}.5"} for n in range(60)]
    with pytest.raises(DataError, match=r"line 9, column 'Price': expected a finite number"):
        proposal(tmp_path, rows)


def test_the_decimal_sign_of_a_flag_is_taken(tmp_path: Path) -> None:
    """Three decimals everywhere could also be thousands, which only the user can tell."""
    rows = [{"text": long(n, 1), "Gewicht": f"{n + 1},{n * 7 % 900 + 100}"} for n in range(60)]
    with pytest.raises(DataError, match="Remove it between thousands, or say"):
        proposal(tmp_path, rows)
    for flags in (("--decimal", ","), ("--decimal", ",", "--task", "number")):
        found = proposal(tmp_path, rows, *flags).domain.task
        assert found == Number("text", "Gewicht", decimal=",")
    spoilt = [row | {"Gewicht": "N/A" if n == 7 else row["Gewicht"]} for n, row in enumerate(rows)]
    with pytest.raises(DataError, match=r"line 9, column 'Gewicht': .* found something else"):
        proposal(tmp_path, spoilt, "--decimal", ",")
    few = [row | {"Gewicht": f"{n},5" if n == 3 else str(n)} for n, row in enumerate(rows)]
    with pytest.raises(DataError, match="Say that it is the decimal sign"):
        proposal(tmp_path, [row | {"Gewicht": row["Gewicht"] + "x" * (n == 9)}
                            for n, row in enumerate(few)])  # fmt: skip
