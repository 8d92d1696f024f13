"""Chats and chat templates from rows to a verdict, on a tiny base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.adapters import strong
from support.commands import FAST, run
from support.models import QUIET, SUITE, declared, model_in, stopped_after

from lora_domains.console import Display
from lora_domains.dataset import reasoned
from lora_domains.errors import ChatTemplateError, DataError, UsageError
from lora_domains.evaluation.baselines import SHOTS, answered_turns, with_shots
from lora_domains.evaluation.scorer import Part, Scorer, reference_of
from lora_domains.inference.generation import generate
from lora_domains.inference.predict import Prediction, task_of
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.modeling.batching import tokenization_of
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.serving.answers import conversation_prompt
from lora_domains.tasks import Chat, Classification, Generation, MultipleChoice, Preference
from lora_domains.tasks.answers import token_f1
from lora_domains.tasks.rows import Row

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ bos_token + message['role'] + ' ' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant ' }}{% endif %}"
)
"""Of the special tokens that the tiny base has."""
THINKING = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' and '<think>' not in message['content'] %}"
    "{{ '<think></think>' }}{% endif %}{{ message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant ' }}"
    "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
"""It has the assistant think first unless told otherwise."""
SECRET = "zqhush"


@pytest.fixture(scope="module")
def chat_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a chat template that ends turns as the base ends answers."""
    folder = tmp_path_factory.mktemp("bases") / "chat"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two questions, each with an answer that follows from it."""
    made = []
    for n, row in enumerate(make_rows(count)):
        turns = [{"role": "user", "content": row["text"]},
                 {"role": "assistant", "content": f"{row['label']} call"}]  # fmt: skip
        if n % 2:
            turns += [{"role": "user", "content": "red river"},
                      {"role": "assistant", "content": "blue stone"}]  # fmt: skip
        made.append({"messages": turns})
    made[1]["messages"][0]["content"] += f" {SECRET}"
    made[1]["messages"][1]["content"] += f" {SECRET}"
    return made


@pytest.mark.parametrize("own", [True, False])
def test_a_base_speaks_in_chats_where_answers_end_as_turns_do(
    own: bool, tiny_base: Path, chat_base: Path
) -> None:
    base = load_base(chat_base if own else tiny_base, device="cpu")
    assert (base.chats, base.chat_template.own) == (own, own)
    base.tokenizer.chat_template = TEMPLATE.replace("eos_token", "pad_token")
    other = replace(base)
    assert not other.chats
    assert other.chat_template.own


@pytest.mark.slow
def test_a_chat_is_fitted_evaluated_rebuilt_and_answers(
    chat_base: Path, tmp_path: Path, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Chat(max_new_tokens=8, generate=True)
    domain = declared(chats(120), "chats", task, epochs=3, retention="none")
    model = DomainModel.from_pretrained(chat_base, out=tmp_path, display=Display(), device="cpu")
    card = model.fit(domain)
    history = card.adapter.training["history"]
    assert history[-1]["validation_loss"] < history[0]["validation_loss"] < 6
    entry = model.evaluate(domain, suite=SUITE).entry
    assert entry.judged["metric"] == "nats_per_token"
    nats = entry.domain_scores["nats_per_token"]
    assert nats["upper"] < 0
    assert list(nats["baselines"]) == [f"{SHOTS}_shot"]
    assert list(entry.domain_scores["rouge_l"]["baselines"]) == ["nearest", f"{SHOTS}_shot"]
    assert rebuild(tmp_path / "chats") == Card.read(tmp_path / "chats")
    assert card.adapter.chat["template"] == "own"
    assert "own chat template" in (tmp_path / "chats" / "README.md").read_text()

    fresh = model_in(tmp_path, chat_base)
    fresh.load_adapter(tmp_path / "chats")
    question = {"messages": [{"role": "user", "content": "alpha red"}]}
    (first, second) = fresh.predict(["alpha red", question], domain="chats")
    assert first == second
    assert isinstance(first, str)
    written = [p for folder in (tmp_path, project) for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())


def test_the_last_answer_of_a_chat_is_generated_and_compared(
    chat_base: Path, tmp_path: Path
) -> None:
    """In left-padded batches as one by one, after the turns before it, with any adapter."""
    model = model_in(tmp_path, chat_base)
    model.bank.add(strong(model.base, "strong"))
    domain = declared(chats(30), "chats", Chat(max_new_tokens=8, generate=True))
    dataset = model.dataset(domain)
    rows = [*dataset.train, *dataset.test]
    part = Part("rows", dataset.domain.task, rows)
    scores = Scorer(model.bank, QUIET).scores(part, [None, "strong"])
    template = dataset.tokenization.template
    assert template is not None
    answers = [[score["text"] for score in scores[name]] for name in (None, "strong")]
    assert answers[0] != answers[1]
    lengths, several = set(), set()
    for at, (example, encoded) in enumerate(rows):
        # A chat that is too long has a part for each answer.
        last = 1 + 2 * int(encoded.id.split("/")[1]) if "/" in encoded.id else -1
        reference = example.messages[last]["content"]
        assert reference_of(rows[at], model.tokenizer) == reference
        prompt = template.prompt(example.messages[:last])
        assert encoded.unanswered().prompt == tuple(prompt)
        lengths.add(len(prompt))
        several.add(last)
        for name, texts in zip((None, "strong"), answers, strict=True):
            with model.bank.routed(name):
                (alone,) = generate(model.base.model, model.tokenizer, [prompt], max_new_tokens=8)
            assert alone.strip() == texts[at]
            f1 = token_f1(texts[at], reference)
            assert scores[name][at]["f1"] == pytest.approx(f1)
    assert len(lengths) > 3
    assert several == {-1, 1, 3}


@pytest.mark.slow
def test_a_chat_resumes_with_the_same_bytes(chat_base: Path, tmp_path: Path) -> None:
    domain = declared(chats(60), "chats", Chat(), epochs=2, retention="none")
    whole = model_in(tmp_path / "whole", chat_base).fit(domain)
    stopped_after(4, domain, tmp_path / "cut", chat_base)
    resumed = model_in(tmp_path / "cut", chat_base).fit(domain, resume=True)
    assert resumed.adapter.sha256 == whole.adapter.sha256


@pytest.mark.slow
def test_a_base_without_a_template_gets_a_plain_one_and_the_card_says_so(
    tiny_base: Path, chat_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = declared(chats(40), "chats", Chat(), epochs=1, retention="none")
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=Display(), device="cpu")
    card = model.fit(domain)
    assert card.adapter.chat["template"] == "plain"
    assert "has no chat template" in " ".join(capsys.readouterr().out.split())
    assert "has no chat template" in (tmp_path / "chats" / "README.md").read_text()
    # The same weights with a template: the adapter says that it has not seen it.
    other = DomainModel.from_pretrained(chat_base, out=tmp_path, display=Display(), device="cpu")
    other.load_adapter("chats")
    assert "another chat template" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("reasoned", "given", "found"),
    [(1, None, "off"), (1, True, "on"), (40, None, "on"), (40, False, "off")],
)
def test_a_base_may_think_first_where_most_answers_do(
    reasoned: int, given: bool | None, found: str, chat_base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = shutil.copytree(chat_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(THINKING)
    rows = chats(40)
    for row in rows[1 : reasoned + 1]:
        row["messages"][-1]["content"] = "<think>red</think>blue"
    domain = declared(rows, "chats", Chat(thinking=given), epochs=1, retention="none")
    model = DomainModel.from_pretrained(folder, out=tmp_path, display=Display(), device="cpu")
    card = model.fit(domain)
    shown = " ".join(capsys.readouterr().out.split())
    assert ("reasoning is left out" in shown) is (found == "off")
    assert card.adapter.chat["thinking"] == found
    assert f"enable_thinking={found == 'on'}" in (tmp_path / "chats" / "README.md").read_text()
    fresh = DomainModel.from_pretrained(folder, out=tmp_path, display=Display(), device="cpu")
    fresh.load_adapter("chats")
    assert "another chat template" not in capsys.readouterr().out
    tokenization = tokenization_of(fresh.base, task_of(fresh.bank, "chats"), 512)
    decode = fresh.tokenizer.decode
    asks = "assistant " if found == "on" else "assistant <think></think>"
    assert decode(tokenization.encode(Chat().to_predict("red", 0)).prompt).endswith(asks)
    tested = fresh.dataset(domain).test[-1].encoded
    assert decode(tested.prompt).endswith(asks)
    assert ("red" in decode(tested.last_answer)) is ((found, reasoned) == ("on", 40))
    asked = [{"role": "user", "content": "red"}]
    for name in ("chats", None):
        prompt = conversation_prompt(fresh.bank, name, asked, thinking=found == "on")
        assert decode(prompt.ids).endswith(asks)
    with pytest.raises(UsageError, match=r"chat_template_kwargs.*what chats was trained with"):
        conversation_prompt(fresh.bank, "chats", asked, thinking=found == "off")
    served = tmp_path / "served"
    assert run("export", str(tmp_path / "chats"), "--to", "vllm", "--base", str(folder), "--out",
               str(served)) == 0  # fmt: skip
    told = json.dumps({"enable_thinking": found == "on", "thinking": found == "on"})
    assert f"--default-chat-template-kwargs '{told}'" in (served / "serve.sh").read_text()


@pytest.mark.parametrize(
    ("answer", "found"),
    [({"content": "yes", "reasoning_content": ""}, False), ({"content": "yes"}, False),
     ({"content": "<think>\n\n</think>\n\nyes"}, False),
     ({"content": "<think>well</think>yes"}, True),
     ({"content": "yes", "reasoning_content": "well"}, True)],
)  # fmt: skip
def test_an_empty_thought_is_no_reasoning(answer: dict[str, str], found: bool) -> None:
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", **answer}]
    row = Row({"messages": turns}, "row", 0, "row 1")
    assert reasoned(Chat().example(row)) is found


def test_pairs_that_differ_in_their_reasoning_only_are_refused(
    chat_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(THINKING)
    rows = [{"prompt": f"red {n}", "chosen": f"<think>a</think>yes {n}",
             "rejected": f"<think>b</think>yes {n}"} for n in range(40)]  # fmt: skip
    model = DomainModel.from_pretrained(folder, out=tmp_path, display=QUIET, device="cpu")
    with pytest.raises(DataError, match=r"40 rows, the first: .*differ beside their reasoning"):
        model.dataset(declared(rows, "pairs", Preference(thinking=False)))
    model.dataset(declared(rows, "others", Preference()))


def test_rows_that_a_template_refuses_stop_the_run_in_one_error(
    chat_base: Path, tmp_path: Path
) -> None:
    rows = chats(40)
    for n in (3, 5):
        rows[n]["messages"].insert(1, {"role": "tool", "content": SECRET})
    with pytest.raises(Exception, match=r"2 rows: .*index 3: .*user, tool.*index 5") as caught:
        model_in(tmp_path, chat_base).fit(declared(rows, "chats", Chat()))
    assert SECRET not in str(caught.value)
    assert not isinstance(caught.value, ChatTemplateError)


# ── Other tasks in a chat template ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("task", "chat"),
    [
        (Classification(), True), (Classification(chat=False), False),
        (Classification(prompt="{text}:"), False),
        (Classification(prompt="{text}:", chat=True), True),
        (Classification(head=True), False), (Generation(text="text", answer="label"), True),
    ],
)  # fmt: skip
def test_chat_is_automatic_on_a_base_that_was_trained_on_chats(
    task: Any, chat: bool, chat_base: Path, tiny_base: Path, tmp_path: Path
) -> None:
    domain = declared(make_rows(60), "some", task)
    dataset = model_in(tmp_path, chat_base).dataset(domain)
    assert dataset.domain.task.chat is chat
    assert (dataset.tokenization.template is not None) is chat
    shown = dataset.tokenization.tokenizer.decode(dataset.train[0].encoded.prompt)
    assert shown.startswith("<s>user ") is chat
    assert dataset.for_domain(domain) is not None
    if not task.head:
        other = replace(domain, task=replace(task, chat=not chat))
        assert dataset.for_domain(other) is None
    plain = model_in(tmp_path, tiny_base).dataset(replace(domain, task=task))
    assert bool(plain.domain.task.chat) is bool(task.chat)


def test_few_shot_examples_are_turns(chat_base: Path, tmp_path: Path) -> None:
    rows = make_rows(60)
    for task in (Classification(instruction="Which?"), Generation(text="text", answer="label")):
        dataset = model_in(tmp_path, chat_base).dataset(declared(rows, task.kind, task))
        warnings: list[str] = []
        prompted = with_shots(dataset, dataset.test, warnings.append)
        assert not warnings
        for row, plain in zip(prompted, dataset.test, strict=True):
            shown = dataset.tokenization.tokenizer.decode(row.encoded.prompt)
            assert shown.count("<s>user ") == shown.count("<s>assistant ") == SHOTS + 1
            assert row.encoded.answer == plain.encoded.answer
            assert shown.endswith(
                dataset.tokenization.tokenizer.decode(plain.encoded.prompt).removeprefix("<s>")
            )


def test_an_example_begins_with_a_question() -> None:
    """A greeting before it would become the end of the answer of the example before."""
    roles = "system", "assistant", "user", "assistant"
    turns = [{"role": role, "content": role} for role in roles]
    example = Chat().example(Row({"messages": turns}, "train", 0, "here"))
    assert [turn["role"] for turn in answered_turns(example)] == ["user", "assistant"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_labels_and_choices_through_a_template(kind: str, chat_base: Path, tmp_path: Path) -> None:
    rows = make_rows(160)
    task: Any = Classification(positive="spam", instruction="Which?")
    if kind == "multiple_choice":
        rows = [{"question": r["text"], "choices": ["red stone", "blue river"],
                 "answer": int(r["label"] == "spam")} for r in rows]  # fmt: skip
        task = MultipleChoice(instruction="Which?")
    domain = declared(rows, "some", task, epochs=2, retention="none")
    model = model_in(tmp_path, chat_base)
    card = model.fit(domain)
    assert card.adapter.declared_task.chat is True
    entry = model.evaluate(domain, suite=SUITE).entry
    nats = entry.domain_scores["nats_per_token"]
    assert nats["adapter"] < nats["base"]
    if kind == "classification":
        fresh = model_in(tmp_path, chat_base)
        fresh.load_adapter("some")
        (answer,) = fresh.predict(rows[0]["text"], domain="some")
        assert isinstance(answer, Prediction)
        stored = json.loads((tmp_path / "some" / "card.json").read_text())
        # A card that is older than chat templates: its adapter was trained on plain prompts.
        del stored["adapters"][0]["settings"]["task"]["chat"]
        assert Card.from_json(stored, "card").adapter.declared_task.chat is False


# ── The command line ────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_one_command_trains_on_a_file_of_chats(
    chat_base: Path, tmp_path: Path, small_suite: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows = chats(80)
    for name, part in (("chat", rows[:60]), ("test", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    code = run("fit", "chat.jsonl", "--test", "test.jsonl", "--base", str(chat_base),
               "--epochs", "1", "--retention", "none", *FAST)  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert code in (0, 1, 3)
    assert "chat, by the columns of the rows" in shown
    assert Card.read(tmp_path / "adapters" / "chat").adapter.task["kind"] == "chat"
    (tmp_path / "new.jsonl").write_text(json.dumps({"messages": rows[0]["messages"][:1]}) + "\n")
    command = ("predict", "chat", "--base", str(chat_base))
    assert run(*command, "--input", "new.jsonl", "--output", "out.jsonl") == 0
    answered = json.loads((tmp_path / "out.jsonl").read_text())
    assert answered["messages"] == rows[0]["messages"][:1]
    assert isinstance(answered["prediction"], str)
    assert run(*command, "alpha red") == 0


def test_the_task_of_a_file_is_shown_or_named(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_suite: None
) -> None:
    rows = [{"question": r["text"], "answer": f"{r['label']} call"} for r in make_rows(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("fit", str(tmp_path / "qa.jsonl"), "--base", str(tiny_base), "--dry-run")
    assert run(*command) == 0
    assert "generation, by the columns of the rows" in " ".join(capsys.readouterr().out.split())
    chat = ("--task", "chat", "--text", "question", "--label", "answer")
    assert run(*command, *chat) == 0
    assert "has no chat template" in " ".join(capsys.readouterr().out.split())
    assert run("fit", "--name", "x") == 2
    assert "training rows" in capsys.readouterr().err
