"""Suites: the row formats of the standard sets, samples, and real files where they exist."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_domains.errors import DataError, DomainError, UsageError
from lora_domains.evaluation.contenders import probe_part
from lora_domains.modeling.base import load_base
from lora_domains.probes import standard
from lora_domains.probes.suite import Probe, Suite, embedded, facts, load_suite, quick
from lora_domains.tasks import Example, Generation, MultipleChoice
from lora_domains.tokenization.tokenization import Tokenization

# A made-up row of each set in its format on the Hub.
SHAPES: dict[str, tuple[dict[str, Any], str, tuple[str, ...], int]] = {
    "mmlu": (
        {"question": "Two and two?", "subject": "sums", "choices": ["3", "4"], "answer": "B"},
        "Question: Two and two?\nAnswer:", (" 3", " 4"), 1,
    ),
    "arc": (
        {"question": "What is wet?", "answerKey": "2",
         "choices": {"text": ["sand", "rain"], "label": ["1", "2"]}},
        "Question: What is wet?\nAnswer:", (" sand", " rain"), 1,
    ),
    "hellaswag": (
        {"activity_label": "Baking", "ctx": "She takes flour. [title] Then", "label": "0",
         "endings": ["[step] she adds water.", "he flies."]},
        "Baking: She takes flour.. Then", (" she adds water.", " he flies."), 0,
    ),
    "winogrande": (
        {"sentence": "The cup fell because _ was wet.", "option1": "the hand", "option2": "it",
         "answer": "1"},
        "The cup fell because", (" the hand was wet.", " it was wet."), 0,
    ),
    "openbookqa": (
        {"question_stem": "Plants need", "answerKey": "B",
         "choices": {"text": ["noise", "light"], "label": ["A", "B"]}},
        "Plants need", (" noise", " light"), 1,
    ),
    "truthfulqa": (
        {"question": "Is glass a liquid?",
         "mc1_targets": {"choices": ["Yes.", "No."], "labels": [0, 1]}},
        "Q: Is glass a liquid?\nA:", (" Yes.", " No."), 1,
    ),
}  # fmt: skip


def scored(suite: Suite) -> list[tuple[str, Example]]:
    """The part and the example of each question of ``suite``."""
    return [(part, example) for _, part, example in suite.questions()]


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_in_the_format_of_the_hub_becomes_a_question(name: str) -> None:
    row, prompt, choices, target = SHAPES[name]
    probe = replace(standard.PROBES[name](), rows=[row])
    ((part, example),) = probe.examples()
    assert (example.prompt, example.choices, example.target) == (prompt, choices, target)
    assert part.startswith(name)


def test_gsm8k_has_worked_examples_and_is_scored_by_the_last_number() -> None:
    rows = [{"question": f"Is {n}?", "answer": f"It is <<{n}={n}>>{n}.\n#### {n}"} for n in "12345"]
    probe = standard.gsm8k(rows[4:], shown=rows)
    ((_, example),) = probe.examples()
    assert example.prompt.count("Question:") == 5
    assert "<<" not in example.prompt + example.answer
    assert isinstance(probe.task, Generation)
    assert probe.task.score_text("so 5 it is: 5\n\nQuestion: 7", example.answer)["exact"] == 1
    assert probe.task.score_text("so 5, no, 6", example.answer)["exact"] == 0
    assert probe.task.score_text("no idea", example.answer)["exact"] == 0


def test_every_standard_set_is_pinned_to_a_revision() -> None:
    for make in standard.PROBES.values():
        source: Any = make().rows
        assert len(source.revision) == 40
        assert int(source.revision, 16)


def test_a_sample_holds_every_probe_and_is_reproducible() -> None:
    rows = [{"question": f"q{n}", "choices": ["a", "b"], "answer": 0} for n in range(300)]
    task = MultipleChoice()
    suite = Suite("two", (Probe("large", task, rows), Probe("small", task, rows[:30])))
    part = replace(suite, limit=100)
    kept = [p for p, _ in scored(part)]
    assert (kept.count("large"), kept.count("small")) == (91, 9)
    again = replace(suite, limit=100)
    assert scored(part) == scored(again)
    assert scored(replace(suite, limit=100, seed=1)) != scored(part)
    assert scored(replace(suite, limit=1000)) == scored(suite)


def test_the_quick_suite_has_questions_of_every_part() -> None:
    assert len(quick().questions()) == 700
    assert {part for part, _ in scored(quick())} == {part for part, _ in scored(embedded())}


def test_a_file_of_questions_or_of_python_is_a_suite(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["a", "b"], "answer": n % 2} for n in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.target for _, example in scored(load_suite(file))] == [0, 1, 0, 1, 0]
    assert len(load_suite(file, limit=2).questions()) == 2
    script = tmp_path / "declared.py"
    script.write_text(
        "from lora_domains.probes.suite import Probe, Suite\n"
        "from lora_domains.tasks import MultipleChoice\n"
        f"suite = Suite('mine', (Probe('mine', MultipleChoice(), {str(file)!r}),))\n"
    )
    assert scored(load_suite(script)) == scored(load_suite(file))


def test_several_suites_are_one_each_with_its_own_limit(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["a", "b"], "answer": 0} for n in range(5)]
    file = tmp_path / "my+own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_suite(file).questions()) == 5
    suite = load_suite("quick+instructions")
    assert suite.name == "quick+instructions"
    parts = [load_suite(name) for name in ("quick", "instructions")]
    assert scored(suite) == [pair for part in parts for pair in scored(part)]
    assert len(scored(suite)) > 700 + 1000
    assert suite.texts()[0].answer == parts[0].texts()[0].answer
    assert len(load_suite("quick+instructions", limit=40).questions()) == 40
    with pytest.raises(UsageError, match="instructions"):
        load_suite("quick+instruction")


@pytest.mark.parametrize("chat", [None, False])
def test_a_probe_in_the_form_of_the_base_leaves_the_template_to_its_task(
    tiny_base: Path, tmp_path: Path, chat: bool | None
) -> None:
    """Facts are asked as they are; where a task leaves it open, the base's template renders it."""
    plain = load_base(tiny_base, device="cpu")
    folder = Path(shutil.copytree(tiny_base, tmp_path / "chat"))
    template = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}<s>"
    (folder / "chat_template.jinja").write_text(template)
    chats = load_base(folder, device="cpu")
    assert (plain.chats, chats.chats) == (False, True)
    probe = facts().probes[0]
    assert probe.task == MultipleChoice(per_token=True, chat=False)
    probe = replace(probe, task=MultipleChoice(per_token=True, chat=chat))
    examples = [example for _, example in probe.examples()[:3]]
    part = probe_part(probe, examples, plain, Tokenization(plain.tokenizer, 16))
    texts = [plain.tokenizer.decode(row.encoded.prompt) for row in part.rows]
    assert texts == [f"<s>{example.prompt}" for example in examples]
    assert all(text.startswith("<s>Question: ") and text.endswith("?\nAnswer:") for text in texts)
    rendered = probe_part(probe, examples, chats, Tokenization(chats.tokenizer, 16))
    prompts = [row.encoded.prompt for row in rendered.rows]
    turns = [example.messages for example in examples]
    if chat is None:
        assert prompts == list(map(chats.chat_template.prompt, turns))
    else:
        assert prompts == [row.encoded.prompt for row in part.rows]
    assert all(len(row.encoded.choices) == 4 for row in part.rows)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("standart", UsageError, "standard"), ("no.py", DomainError, "no such file"),
     ("no.jsonl", DataError, "no such file")],
)  # fmt: skip
def test_an_unknown_suite_is_refused(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_suite(name).questions()


SETS: Mapping[str, tuple[str, int]] = {
    "mmlu": ("probe_mmlu", 14042),
    "openbookqa": ("probe_openbookqa", 500),
    "gsm8k": ("probe_gsm8k", 1319),
}


@pytest.mark.parametrize("name", SETS)
def test_real_questions_are_read_from_local_files(real_data: Path, name: str) -> None:
    folder, count = SETS[name]
    probe = standard.PROBES[name]()
    shown = str(real_data / folder / "train.jsonl") if probe.shots else None
    probe = replace(probe, rows=str(real_data / folder / "test.jsonl"), shown=shown)
    examples = probe.examples()
    assert len(examples) == count
    assert all(example.prompt.strip() for _, example in examples)
    parts = {part for part, _ in examples}
    assert len(parts) == (57 if name == "mmlu" else 1)


def test_real_wikitext_is_read_as_paragraphs(real_data: Path) -> None:
    texts = standard.wikitext(str(real_data / "text_wikitext2" / "test.txt"))
    assert len(texts) == 200
    assert min(map(len, texts)) >= 200
