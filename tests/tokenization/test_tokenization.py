"""Examples to token ids: what is supervised, what is truncated, windows of plain text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import (
    ALL,
    CHATML,
    GEMMA,
    LLAMA,
    MISTRAL,
    OPEN,
    QWEN,
    UNSTABLE,
    UNSTABLE_MARKED,
    chat_tokenizer,
)
from support.encoders import make_tokenizer

from lora_domains.data.prepare import RowCounts
from lora_domains.dataset import (
    all_too_long,
    check_choices,
    with_token_counts,
)
from lora_domains.errors import AnswerTooLong, ChatTemplateError, DataError, TrainingError
from lora_domains.tasks import (
    Chat,
    Classification,
    Example,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Row,
)
from lora_domains.tokenization.chat_template import ChatTemplate
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.tokenization.turns import Shots

TEXTS = st.text(
    alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=60
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def metaspace(scheme: str = "always", bos: bool = True) -> Any:
    """A tokenizer that writes spaces as sentencepiece does, with the prepend scheme ``scheme``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    words = ["▁spam", "▁ham", "spam", "ham", "▁note", "▁triage"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters, *words])}
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.setdefault(left + letter, len(vocabulary))
            left += letter
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def example(prompt: str, answer: str, choices: tuple[str, ...] = ()) -> Example:
    target = choices.index(answer) if answer in choices else -1
    return Example("test:0", prompt, answer, choices, target, place="rows.csv, line 2")


# ── One example ─────────────────────────────────────────────────────────────────────────────────


@given(prompt=TEXTS, answer=TEXTS, size=st.integers(130, 400))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_complete_and_ends_with_eos_however_long_the_prompt(
    tokenizer: Any, prompt: str, answer: str, size: int
) -> None:
    tokenization = Tokenization(tokenizer, size)
    tail = tokenization.answer_tokens(" " + answer)
    if len(tail) + 3 > size:
        with pytest.raises(DataError):
            tokenization.encode(example(prompt, " " + answer))
        return
    item = tokenization.encode(example(prompt, " " + answer))
    assert item.answer == (*tail, tokenizer.eos_token_id)
    assert len(item) <= size
    assert item.truncated == (len(tokenization.tokens(prompt)) + 1 + len(item.answer) > size)
    assert item.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(item.answer, skip_special_tokens=True) == " " + answer


def test_each_example_has_exactly_one_bos_if_the_tokenizer_adds_one(tokenizer: Any) -> None:
    item = Tokenization(tokenizer, 64).encode(example("note: alpha\ntriage:", " urgent"))
    assert [*item.prompt, *item.answer].count(tokenizer.bos_token_id) == 1
    without = metaspace(bos=False)
    bare = Tokenization(without, 64).encode(example("note: alpha:", " spam"))
    assert without.bos_token_id not in (*bare.prompt, *bare.answer)


# ── Text that spells a special token ────────────────────────────────────────────────────────────


def classified(template: str, **values: str) -> Example:
    row = Row({"text": "", "label": "spam", **values}, "train", 0, "rows.csv, line 2")
    return Classification(labels=("ham", "spam"), prompt=template).example(row)


@pytest.mark.parametrize("name", ["<s>", "</s>", "<pad>"])
def test_what_a_row_spells_is_text(tokenizer: Any, name: str) -> None:
    tokenization = Tokenization(tokenizer, 120)
    special = tokenizer.convert_tokens_to_ids(name)
    text = f"the chair was {name}red{name} now"
    item = tokenization.encode(classified("{text} is", text=text))
    assert special not in item.prompt[1:]
    assert tokenizer.decode(item.prompt[1:]) == f"{text} is"
    answer = Tokenization(tokenizer, 64).encode(example("text:", f" {name}red"))
    assert special not in answer.answer[:-1]
    assert tokenizer.decode(answer.answer[:-1]) == f" {name}red"
    plain = LanguageModelling().example(Row({"text": text}, "train", 0, ""))
    (window,) = tokenization.windows(plain)
    assert special not in window.answer[:-1]


def test_a_special_token_of_the_template_stays_one(tokenizer: Any) -> None:
    tokenization = Tokenization(tokenizer, 120)
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<pad>"))
    item = tokenization.encode(classified("a {text}</s>b:", text="red alpha"))
    assert item.prompt.count(end) == 1
    assert list(item.prompt[1:]) == tokenization.tokens("a red alpha</s>b:", special=True)
    mixed = tokenization.encode(classified("a {text}</s>b:", text="red <pad> alpha"))
    assert (mixed.prompt.count(end), mixed.prompt.count(pad)) == (1, 0)
    with pytest.raises(DataError, match=r"rows\.csv, line 2.*no special token of the prompt"):
        tokenization.encode(classified("a {text}</s>b:", text="red </s> alpha"))


def test_an_encoder_reads_no_mask_in_a_row() -> None:
    tokenizer = make_tokenizer()
    tokenization = Tokenization(tokenizer, 64, head=True, bidirectional=True)
    item = tokenization.encode(classified("{text}", text="red [MASK] green [SEP]"))
    assert item.prompt.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in item.prompt


# ── Length ──────────────────────────────────────────────────────────────────────────────────────


def test_truncation_drops_the_middle_of_the_prompt(tokenizer: Any) -> None:
    words = [f"w{i}" for i in range(80)]
    prompt = "note: " + " ".join(words) + "\ntriage:"
    tokenization = Tokenization(tokenizer, 60)
    item = tokenization.encode(example(prompt, " urgent"))
    ids = tokenization.tokens(prompt)
    room = 60 - 1 - len(item.answer)
    kept = list(item.prompt[1:])
    assert item.truncated
    assert len(item) == 60
    head = room // 2
    assert kept == ids[:head] + ids[-(room - head) :]
    text = tokenizer.decode(kept)
    assert text.startswith("note: w0 w1")
    assert text.endswith("w79\ntriage:")
    assert "w40" not in text


def test_room_is_left_for_the_longest_choice(tokenizer: Any) -> None:
    choices = (" a", " b c d e f g h i j k l m n o p")
    tokenization = Tokenization(tokenizer, 40)
    item = tokenization.encode(example("note: " + "alpha " * 60 + ":", " a", choices))
    assert len(item.prompt) + max(map(len, item.choices)) + 1 <= 40
    assert item.choices[item.target] == item.answer[:-1]


def test_an_answer_longer_than_the_context_is_refused_with_its_location(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.csv, line 2.*context of 16 tokens") as caught:
        Tokenization(tokenizer, 16).encode(example("note: a", " zq" * 30))
    assert "zq" not in str(caught.value)


def test_shots_go_between_bos_and_the_prompt(tokenizer: Any) -> None:
    tokenization = Tokenization(tokenizer, 64)
    plain = tokenization.encode(example("note: alpha:", " spam"))
    prefixed = tokenization.encode(example("note: alpha:", " spam"), Shots((7, 8, 9)))
    assert prefixed.prompt == (plain.prompt[0], 7, 8, 9, *plain.prompt[1:])


@given(prompt=TEXTS, size=st.integers(20, 60), shorter=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_encoding_a_row_again_gives_what_encoding_its_example_gives(
    tokenizer: Any, prompt: str, size: int, shorter: int
) -> None:
    one = example(prompt, " spam")
    (row,) = Tokenization(tokenizer, size).encode_rows([one])
    other = Tokenization(tokenizer, size - shorter)
    assert other.encode_again(row, Shots((7, 8))) == other.encode(one, Shots((7, 8)))


@given(text=st.text(alphabet="ab cdé\n", min_size=1, max_size=300), size=st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_windows_supervise_each_token_once(tokenizer: Any, text: str, size: int) -> None:
    tokenization = Tokenization(tokenizer, size)
    items = tokenization.windows(Example("test:3", "", text))
    together = [token for item in items for token in item.answer]
    assert together == [*tokenization.tokens(text), tokenizer.eos_token_id]
    assert all(len(item) <= size and item.prompt for item in items)
    assert len({item.id for item in items}) == len(items)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("answer", [" spam", " ham", " other words"])
def test_metaspace_answers_are_the_tokens_of_the_joined_text(scheme: str, answer: str) -> None:
    made = metaspace(scheme)
    tokenization = Tokenization(made, 64)
    item = tokenization.encode(example("note: x\ntriage:", answer))
    whole = made("note: x\ntriage:" + answer)["input_ids"]
    assert [*item.prompt, *item.answer] == [*whole, made.eos_token_id]
    # One space only: a doubled one would never be seen in ordinary text.
    assert made.convert_ids_to_tokens(item.answer[0]).count("▁") == 1


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ((" spam", " spam"), "the same tokens"),
        ((" ham", ""), "no token"),
    ],
)
def test_labels_that_are_not_distinct_are_refused(
    tokenizer: Any, choices: tuple[str, ...], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        check_choices(Tokenization(tokenizer, 64), choices, "domain 'x', column 'label'")


@pytest.mark.parametrize("labels", [(" card", " card arrival"), ("10", "1", "2"), (" a b", " a")])
def test_the_end_is_scored_where_a_label_begins_another(
    tokenizer: Any, labels: tuple[str, ...]
) -> None:
    tokenization = Tokenization(tokenizer, 64)
    check_choices(tokenization, labels, "x")
    one = replace(example("note: a\nlabel:", labels[0], labels), whole=True)
    item = tokenization.encode(one)
    begins = any(a != b and b[: len(a)] == a for a in map(tokenization.answer_tokens, labels)
                 for b in map(tokenization.answer_tokens, labels))  # fmt: skip
    assert begins or labels[0] == "10"
    assert all((choice[-1] == tokenization.eos) == begins for choice in item.choices)
    assert item.choices[0] == (item.answer if begins else item.answer[:-1])
    assert len(set(item.choices)) == len(labels)


def test_labels_of_their_own_beginnings_have_no_end(tokenizer: Any) -> None:
    labels = (" card", " cash")
    item = Tokenization(tokenizer, 64).encode(replace(example("a:", " card", labels), whole=True))
    assert item.choices[0] == item.answer[:-1]


def test_each_answer_that_does_not_fit_is_reported(tokenizer: Any) -> None:
    rows = [replace(example("note: a", " zq" * (30 if n % 3 == 0 else 1)), id=str(n),
                    place=f"rows.csv, line {n}") for n in range(9)]  # fmt: skip
    fitting, errors = Tokenization(tokenizer, 16).encode_fitting(rows)
    assert [row.example.id for row in fitting] == ["1", "2", "4", "5", "7", "8"]
    error = all_too_long(errors, "answer")
    assert error.where == "3 rows, column 'answer'"
    for n in (0, 3, 6):
        assert f"rows.csv, line {n}: an answer of" in error.found
    assert "zq" not in str(error)


def test_plain_text_is_read_in_windows(tokenizer: Any) -> None:
    text = Example("t:0", "", "red river " * 40)
    assert max(map(len, Tokenization(tokenizer, 1000, window=20).windows(text))) <= 20


def test_labels_may_share_a_beginning(tokenizer: Any) -> None:
    check_choices(Tokenization(tokenizer, 64), (" spam call", " spam text", " ham"), "x")


def test_windows_are_sampled_from_all_over_the_texts(tokenizer: Any) -> None:
    tokenization = Tokenization(tokenizer, 10)
    texts = [LanguageModelling().example(Row({"text": "red river " * n}, "general", n, "here"))
             for n in (1, 30, 20, 2)]  # fmt: skip
    whole = tokenization.encode_all(texts)
    assert len(whole) > 8
    found = tokenization.sample_windows(texts, 6)
    assert len(found) == 6
    assert (
        found == [item for item in whole if item in found] == tokenization.sample_windows(texts, 6)
    )
    assert max(int(item.id.split("/")[-1]) for item in found) > 0
    assert tokenization.sample_windows(texts, 10**6) == whole
    assert {item.id.rpartition("/")[0] for item in tokenization.sample_windows(texts, 2)} <= {
        text.id for text in texts[:2]
    }
    assert tokenization.sample_windows([], 5) == []


def test_rows_without_supervision_are_counted_and_refused_if_there_are_no_others() -> None:
    counts = RowCounts(read=3, refused=0, duplicates=0)
    with pytest.raises(TrainingError, match="at least one supervised token"):
        with_token_counts(counts, [EncodedExample("a", (1,), ()), EncodedExample("b", (1,), ())])
    items = [
        EncodedExample("a", (1,), (5, 2)),
        EncodedExample("b", (1,), ()),
        EncodedExample("c", (1,), (2,), truncated=True),
    ]
    filled = with_token_counts(counts, items)
    assert (filled.truncated, filled.masked, filled.supervised_tokens) == (1, 1, 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 3)), min_size=1, max_size=12))
def test_rows_are_encoded_together_as_they_are_one_by_one(
    tiny_base: Path, rows: list[tuple[str, str, int]]
) -> None:
    """Prompts, some with special tokens in the template or the text, and plain texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    examples = []
    for n, (text, answer, kind) in enumerate(rows):
        if kind == 3:
            examples.append(Example(f"x:{n}", "", text))
            continue
        literal, own = f"{eos} label:" if kind else "", text + pad * (kind == 2)
        prompt = own + literal
        examples.append(Example(f"x:{n}", prompt, answer, text=own, literal=literal))
    together = Tokenization(tokenizer, 400).encode_rows(examples)
    apart = [row for one in examples for row in Tokenization(tokenizer, 400).encode_rows([one])]
    assert together == apart
    for example, encoded in together:
        if example.prompt:
            tokenization = Tokenization(tokenizer, 400)
            assert encoded.prompt[len(tokenization.bos) :] == tuple(
                tokenization.prompt_tokens(example)
            )
            assert encoded.answer[:-1] == tokenization.answer_tokens(example.answer)


def test_rows_share_the_tokens_of_their_labels(tokenizer: Any) -> None:
    task = Classification(labels=tuple(f"topic {n}" for n in range(300)))
    rows = [Row({"text": f"mail {n}", "label": f"topic {n}"}, "train", n, "f") for n in range(40)]
    examples = [task.example(row) for row in rows]
    assert len({id(example.choices) for example in examples}) == 1
    encoded = Tokenization(tokenizer, 200).encode_all(examples)
    assert len({id(one.choices) for one in encoded}) == 1
    tokens = [token for one in encoded for token in one.prompt]
    assert len({id(token) for token in tokens}) == len({*tokens})


# ── Chat templates ──────────────────────────────────────────────────────────────────────────────


def chat(template: str | None, size: int = 200) -> Tokenization:
    tokenizer = chat_tokenizer(template)
    return Tokenization(tokenizer, size, template=ChatTemplate(tokenizer))


def conversation(*contents: str) -> Example:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return Chat().example(Row({"messages": turns}, "train", 4, "chat.jsonl, line 5"))


def supervised(tokenization: Tokenization, part: EncodedExample) -> str:
    kept = [t for i, t in enumerate(part.answer) if i not in part.unsupervised]
    assert len(kept) == part.supervised
    text: str = tokenization.tokenizer.decode(kept)
    return text


def test_a_chat_is_one_example_with_its_answers_supervised() -> None:
    tokenization = chat(CHATML)
    (row,) = tokenization.encode_rows([conversation("hello", "fine", "how", "I am", "you")])
    part = row.encoded
    assert supervised(tokenization, part) == "fine<|im_end|>I am<|im_end|>"
    assert tokenization.tokenizer.decode(part.prompt).endswith("<|im_start|>assistant\n")
    between = "\n<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"
    assert tokenization.tokenizer.decode([part.answer[i] for i in part.unsupervised]) == between
    assert (part.id, part.truncated, part.target) == ("train:4", False, -1)


def test_a_chat_that_is_too_long_is_one_example_for_each_answer() -> None:
    one = conversation("hello " * 30, "fine " * 3, "how " * 8, "I am " * 3)
    whole, short = chat(CHATML), chat(CHATML, 60)
    (row,) = whole.encode_rows([one])
    assert len(row.encoded) > 60
    parts = [row.encoded for row in short.encode_rows([one])]
    assert [part.id for part in parts] == ["train:4/0", "train:4/1"]
    assert "".join(supervised(short, part) for part in parts) == supervised(whole, row.encoded)
    assert all(len(part) == 60 and part.truncated for part in parts)
    assert all(short.tokenizer.decode(part.prompt).endswith("assistant\n") for part in parts)
    with pytest.raises(AnswerTooLong, match=r"chat\.jsonl, line 5: .*context of 60 tokens"):
        short.encode_rows([conversation("hello", "fine " * 60)])


def test_answers_that_are_rendered_otherwise_are_parts_of_their_own() -> None:
    tokenization = chat(QWEN)
    rows = tokenization.encode_rows([conversation("hello", "fine", "how", "I am")])
    assert [row.encoded.id for row in rows] == ["train:4/0", "train:4/1"]
    assert [supervised(tokenization, row.encoded) for row in rows] == [
        "<think>\n\n</think>\n\nfine<|im_end|>", "<think>\n\n</think>\n\nI am<|im_end|>",
    ]  # fmt: skip


def test_turns_that_a_template_refuses_are_listed_with_their_rows() -> None:
    turns = [*conversation("hello", "fine").messages, {"role": "tool", "content": "x"},
             {"role": "assistant", "content": "I am"}]  # fmt: skip
    row = Row({"messages": turns}, "train", 6, "chat.jsonl, line 7")
    both = [conversation("hello", "fine"), Chat().example(row)]
    rows, errors = chat(GEMMA).encode_fitting(both)
    assert [row.example.id for row in rows] == ["train:4"]
    assert [(type(error), error.where) for error in errors] == [
        (ChatTemplateError, "chat.jsonl, line 7")
    ]


def test_a_template_whose_answers_do_not_follow_its_prompts_is_refused_unless_it_marks_them() -> (
    None
):
    with pytest.raises(ChatTemplateError, match=r"the chat template of the base: .*no marks"):
        chat(UNSTABLE)
    tokenization = chat(UNSTABLE_MARKED)
    (row,) = tokenization.encode_rows([conversation("hello", "fine", "how", "I am")])
    assert supervised(tokenization, row.encoded) == "fine<|im_end|>I am<|im_end|>"
    item = tokenization.encode(TASKS[0].example(Row({"q": "x", "a": "ham"}, "train", 0, "here")))
    assert tokenization.tokenizer.decode(item.answer) == "ham<|im_end|>"


TASKS = [
    Classification(text="q", label="a", labels=("spam", "ham"), chat=True),
    Classification(text=("q", "c"), label="a", labels=("ham", "spam"), chat=True, prompt="{q}?"),
    MultipleChoice(question="q", choices="b", answer="a", chat=True),
    Generation(text="q", answer="a", chat=True),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_prompts_and_answers_are_what_a_conversation_of_them_has(name: str, task: Any) -> None:
    tokenization = chat(ALL[name])
    values = {"q": "hello </s> world", "c": "x", "a": "spam", "b": ["spam", "ham"]}
    one = task.example(Row(values, "train", 0, "here"))
    item = tokenization.encode(one)
    turns = [*one.messages, {"role": "assistant", "content": "spam"}]
    assert tokenization.template is not None
    (whole,) = tokenization.template.conversation(turns)
    assert (*item.prompt, *item.answer) == whole.ids
    assert item.answer[-len(tokenization.end) :] == tokenization.end
    if item.choices:
        assert item.choices[item.target] == item.answer[: -len(tokenization.end)]
    asked = tokenization.encode(task.unlabelled(Row(values, "input", 0, "here")))
    assert asked.prompt == item.prompt


@pytest.mark.parametrize("template", [CHATML, LLAMA, OPEN, None])
def test_shots_are_turns(template: str | None) -> None:
    tokenization = chat(template)
    one = TASKS[-1].example(Row({"q": "how " * 20, "a": "ham"}, "train", 0, "here"))
    shots = Shots(messages=({"role": "user", "content": "hello"},
                            {"role": "assistant", "content": "fine"}))  # fmt: skip
    item = tokenization.encode(one, shots)
    shown = tokenization.tokenizer.decode(item.prompt)
    assert shown.index("hello") < shown.index("fine") < shown.index("how")
    (row,) = tokenization.encode_rows([one])
    assert tokenization.encode_again(row, shots) == item
    assert item.answer == row.encoded.answer
    rest = len(item.prompt) - len(row.encoded.prompt)
    short = chat(template, len(item) - 10)
    cut = short.encode(one, shots)
    assert cut.truncated
    assert len(cut) == len(item) - 10
    assert cut.prompt[:rest] == item.prompt[:rest]  # the shots are whole
    system = {"role": "system", "content": "think"}
    assert shots.before([system, *one.messages])[0] == system


def test_the_answers_of_a_chat_are_the_same_after_shots() -> None:
    tokenization = chat(CHATML)
    one = conversation("hello", "fine", "how", "I am")
    (row,) = tokenization.encode_rows([one])
    shots = Shots(messages=conversation("you", "are").messages)
    again = tokenization.encode_again(row, shots)
    assert (again.answer, again.unsupervised) == (row.encoded.answer, row.encoded.unsupervised)
    assert len(again.prompt) > len(row.encoded.prompt)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA, MISTRAL])
@pytest.mark.parametrize(
    "roles", ["ua", "uaua", "uaaua", "uaa", "auauaa", "suauaa"], ids=lambda names: names
)
def test_answers_in_turn_are_the_same_after_shots(template: str, roles: str) -> None:
    """A template that demands that roles alternate takes two answers as one."""
    tokenization = chat(template)
    names = {"u": "user", "a": "assistant", "s": "system"}
    turns = [{"role": names[role], "content": f"red {n}"} for n, role in enumerate(roles)]
    one = Chat().example(Row({"messages": turns}, "train", 4, "chat.jsonl, line 5"))
    shots = Shots(messages=conversation("you", "are", "how", "ham").messages)
    for row in tokenization.encode_rows([one]):
        again = tokenization.encode_again(row, shots)
        assert (again.answer, again.unsupervised) == (row.encoded.answer, row.encoded.unsupervised)
        shown = tokenization.tokenizer.decode(again.prompt)
        assert all(word in shown for word in ("you", "are", "how", "ham"))


def test_a_chat_without_room_for_shots_says_so() -> None:
    one = conversation("hello " * 8, "fine", "how", "I am")
    whole = chat(CHATML).encode_rows([one])[0].encoded
    tokenization = chat(CHATML, len(whole))
    (row,) = tokenization.encode_rows([one])
    with pytest.raises(AnswerTooLong):
        tokenization.encode_again(row, Shots(messages=conversation("you", "are").messages))


def test_general_text_begins_as_ever() -> None:
    tokenizer = chat_tokenizer(CHATML)
    text = Example("t:0", "", "hello world")
    plain = Tokenization(tokenizer, 64).windows(text)
    assert Tokenization(tokenizer, 64, template=ChatTemplate(tokenizer)).windows(text) == plain
