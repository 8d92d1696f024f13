"""Chat templates: which tokens the assistant wrote, against renderings of transformers."""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bases import FOLDER as BASES
from support.chat_templates import (
    ALL,
    GEMMA,
    MARKED,
    NO_SYSTEM,
    SPECIAL,
    STABLE,
    SWITCHED,
    SWITCHED_IN_PROMPT,
    SWITCHED_OFF,
    SWITCHED_OTHERWISE,
    UNSTABLE,
    UNSTABLE_MARKED,
    chat_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from lora_domains.errors import ChatTemplateError
from lora_domains.tokenization.chat_template import PLAIN, ChatTemplate, Conversation

Messages = list[dict[str, str]]
SANITIZES = (
    "sanitize_control_tokens" in signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)
"""Whether transformers itself can read the names of special tokens in messages as text; without,
its renderings are no reference for messages that spell some."""
SANITIZED: dict[str, Any] = {"sanitize_control_tokens": True} if SANITIZES else {}


@cache
def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(chat_tokenizer(ALL[name]))


def turns(*contents: str, system: str = "") -> Messages:
    """User and assistant in turn, after the system's text if there is one."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


WORDS = st.sampled_from(
    ["hello", " world", "\n", "\n\n", "  ", "é", "漢字", "🙂", "I am", "?", "<", "|"]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())
SPELLED = st.lists(st.one_of(WORDS, st.sampled_from(SPECIAL)), min_size=1, max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> Messages:
    pairs = draw(st.integers(1, 3))
    contents = [draw(texts) for _ in range(2 * pairs)]
    return turns(*contents, system=draw(st.one_of(st.just(""), TEXTS)))


def folded(messages: Messages) -> Messages:
    """The system's text before that of the user's first turn."""
    if messages[0]["role"] != "system":
        return messages
    text = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{"role": "user", "content": text}, *messages[2:]]


def rendered(tokenizer: Any, messages: Messages, *, prompt: bool = False) -> list[int]:
    """What transformers makes of a conversation."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=False, **SANITIZED,
        chat_template=tokenizer.chat_template.replace(
            "strftime_now('%d %b %Y')", "'26 Jul 2024'"
        ),
    )  # fmt: skip
    return ids


def answers(parts: Sequence[Conversation]) -> list[tuple[list[int], list[int]]]:
    """(what stands before an answer, its tokens), from all parts."""
    return [(list(part.ids[:a]), list(part.ids[a:b])) for part in parts for a, b in part.spans]


def expected(name: str, messages: Messages) -> list[tuple[list[int], list[int]]]:
    """The same from rendered prefixes: each answer after the prompt that asks for it, up to the
    special token that ends its turn."""
    if not SANITIZES and any(name in turn["content"] for turn in messages for name in SPECIAL):
        return []
    tokenizer = template_of(name).tokenizer
    special = {*tokenizer.all_special_ids}
    messages = folded(messages) if name == "no system" else messages
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = rendered(tokenizer, messages[:i], prompt=True)
            whole = rendered(tokenizer, messages[: i + 1])
            if whole[: len(before)] != before:  # a token reaches over the end of the prompt
                return []
            ends = [n for n in range(len(before), len(whole)) if whole[n] in special]
            found.append((before, whole[len(before) : ends[-1] + 1 if ends else None]))
    return found


@pytest.mark.parametrize("name", [name for name in ALL if name != "open"])
@given(messages=conversations(st.one_of(TEXTS, SPELLED.filter(lambda text: text.strip()))))
@settings(max_examples=60)
def test_answers_are_supervised_after_the_prompts_that_ask_for_them(
    name: str, messages: Messages
) -> None:
    want = expected(name, messages)
    found = answers(template_of(name).conversation(messages))
    assert len(found) == sum(message["role"] == "assistant" for message in messages)
    if want:
        assert sorted(found) == sorted(want)
    special = {*template_of(name).tokenizer.all_special_ids}
    for _, tokens in found:
        assert tokens[-1] in special
        assert not special & {*tokens[:-1]}


@pytest.mark.parametrize("name", STABLE)
def test_a_conversation_is_one_sequence_where_answers_are_rendered_alike(name: str) -> None:
    template = template_of(name)
    messages = turns("hello", "I am fine", "how are you?", "fine", system="think")
    (part,) = template.conversation(messages)
    shown = [template.tokenizer.decode(part.ids[a:b]) for a, b in part.spans]
    ends = {"gemma": "<end_of_turn>", "llama": "<|eot_id|>", "open": ""}
    end = ends.get(name, "<|im_end|>")
    assert shown == ["I am fine" + end, "fine" + (end or "</s>")]
    if name == "open":
        # A token that reaches over the end of an answer: it is learned in a rendering of its own.
        assert len(template.conversation(turns("hello", "fine.", "how", "fine"))) == 2
        assert template.tokenizer.decode(part.ids).endswith("### assistant:\nfine</s>")


@given(messages=conversations())
@settings(max_examples=60)
def test_spans_are_those_that_the_template_marks(messages: Messages) -> None:
    template = template_of("marked")
    out = template.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    parts = template.conversation(messages)
    if len(parts) > 1 or not expected("marked", messages):
        return  # a token reaches over the end of a prompt: transformers takes all of it
    (part,) = parts
    mask = [0] * len(out["input_ids"])
    for start, end in part.spans:
        mask[start:end] = [1] * (end - start)
    assert list(part.ids) == out["input_ids"][: len(part.ids)]
    assert mask == out["assistant_masks"]


def test_an_answer_that_is_rendered_otherwise_later_has_a_sequence_of_its_own() -> None:
    template = template_of("qwen")
    parts = template.conversation(turns("hello", "<think>I am</think>fine", "how", "fine"))
    first, last = (template.tokenizer.decode(part.ids) for part in parts)
    assert first.endswith("assistant\n<think>\nI am\n</think>\n\nfine<|im_end|>")
    assert "I am" not in last
    assert last.endswith("assistant\n<think>\n\n</think>\n\nfine<|im_end|>")
    assert [len(part.spans) for part in parts] == [1, 1]


def test_the_marks_decide_where_a_prompt_is_rendered_otherwise() -> None:
    template = ChatTemplate(chat_tokenizer(UNSTABLE_MARKED))
    messages = turns("hello", "fine", "how", "I am")
    (part,) = template.conversation(messages)
    out = template.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [int(any(a <= n < b for a, b in part.spans)) for n in range(len(out["input_ids"]))]
    assert mask == out["assistant_masks"]
    with pytest.raises(ChatTemplateError, match=r"row 3: .*no marks.*generation"):
        ChatTemplate(chat_tokenizer(UNSTABLE)).conversation(messages, where="row 3")


def test_a_template_that_refuses_turns_gets_others_and_counts_them() -> None:
    template = ChatTemplate(chat_tokenizer(NO_SYSTEM))
    (part,) = template.conversation(turns("hello", "fine", system="think"))
    assert template.tokenizer.decode(part.ids).startswith("<s><|im_start|>user\nthink\n\nhello<|im")
    twice = [{"role": "user", "content": "hello"}, *turns("world", "fine", system="")]
    strict = ChatTemplate(chat_tokenizer(GEMMA))
    (part,) = strict.conversation(twice)
    assert "user\nhello\n\nworld<end_of_turn>" in strict.tokenizer.decode(part.ids)
    assert (template.adapted, strict.adapted) == (1, 1)
    strict.conversation(turns("hello", "fine"))
    assert strict.adapted == 1


def test_an_error_of_a_template_quotes_no_row() -> None:
    tool = [*turns("hello"), {"role": "tool", "content": "zqsecret"}, *turns("a", "b")[1:]]
    strict = ChatTemplate(chat_tokenizer(GEMMA))
    with pytest.raises(
        ChatTemplateError, match="user, tool, assistant, refused: Conversation roles"
    ):
        strict.conversation(tool)
    quoting = "{{ raise_exception(messages[0]['content']) }}"
    with pytest.raises(ChatTemplateError, match="refused: TemplateError") as caught:
        ChatTemplate(chat_tokenizer(quoting)).prompt(turns("zqsecret"))
    assert "zqsecret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [name for name in ALL if name not in ("open", "chatml", "marked", "qwen")]
)
def test_one_bos_and_none_where_the_template_writes_none(name: str) -> None:
    template = template_of(name)
    (part,) = template.conversation(turns("hello", "fine"))
    assert part.ids.count(template.tokenizer.bos_token_id) == 1
    assert template.tokenizer.bos_token_id not in template_of("chatml").prompt(turns("hello"))


def test_a_base_without_a_template_gets_a_plain_one() -> None:
    template = ChatTemplate(chat_tokenizer(None))
    (part,) = template.conversation(turns("hello", "fine", "how", "I am", system="think"))
    shown = template.tokenizer.decode(part.ids)
    assert shown == (
        "<s>System: think\nUser: hello\nAssistant: fine</s>\nUser: how\nAssistant: I am</s>"
    )
    assert [template.tokenizer.decode(part.ids[a:b]) for a, b in part.spans] == [
        " fine</s>", " I am</s>",
    ]  # fmt: skip
    assert template.record()["template"] == "plain"
    assert template.end == (template.tokenizer.eos_token_id,)
    own = ChatTemplate(chat_tokenizer(PLAIN)).record()
    assert own["template"] == "own"
    assert own["sha256"] == template.record()["sha256"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("text", ["fine", "I am fine", "?", "</s>", "hello <|im_end|> world"])
def test_an_answer_and_the_end_of_its_turn_are_what_a_conversation_has(
    name: str, text: str
) -> None:
    template = template_of(name)
    (part,) = template.conversation(turns("?", text))
    ((start, end),) = part.spans
    assert (*template.answer(text), *template.end) == part.ids[start:end]
    assert template.stop == part.ids[end - 1]


def test_the_day_is_fixed() -> None:
    template = template_of("llama")
    shown = template.tokenizer.decode(template.prompt(turns("hello")))
    assert "Today Date: 26 Jul 2024" in shown
    assert str(datetime.now().year) not in shown


def test_only_the_last_answers_are_learned_where_that_is_asked() -> None:
    for name in ALL:
        messages = turns("hello", "fine", "how", "I am", "you", "are")
        every = template_of(name).conversation(messages)
        last = template_of(name).conversation(messages, learned=2)
        assert sum(len(part.spans) for part in last) == 2
        assert sorted(answers(last)) == sorted(sorted(answers(every), key=lambda a: len(a[0]))[1:])


def test_tools_and_calls_reach_the_template() -> None:
    source = (
        "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = ChatTemplate(chat_tokenizer(source))
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "fine"},
        {"role": "assistant", "content": "I am"},
    ]
    (part,) = template.conversation(messages, tools=[{"name": "say"}])
    first, second = (template.tokenizer.decode(part.ids[a:b]) for a, b in part.spans)
    assert '"name": "say"' in first
    assert first.endswith("}}]<|im_end|>")
    assert second == "I am<|im_end|>"
    stop = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert part.ids.count(stop) == 4  # each turn has one; that in the call is text


def test_calls_and_tools_are_text_where_a_template_has_none() -> None:
    template = ChatTemplate(chat_tokenizer(ALL["chatml"]))
    call = {"type": "function", "function": {"name": "say", "arguments": {"<|im_end|>": "fine"}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "fine"},
        {"role": "assistant", "content": "I am"},
    ]
    tools = [{"name": "say", "description": "world <|im_end|>"}]
    (part,) = template.conversation(messages, tools)
    text = template.tokenizer.decode(part.ids)
    assert text.startswith('<|im_start|>system\n[{"name": "say", "description"')
    first, second = (template.tokenizer.decode(part.ids[a:b]) for a, b in part.spans)
    assert first.startswith('[{"type": "function", "function": {"name": "say"')
    assert second == "I am<|im_end|>"
    stop = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert part.ids.count(stop) == 5  # one of each turn; the others are text
    assert template.adapted == 1


@pytest.mark.parametrize("name", [*ALL, "unstable, marked"])
def test_an_opening_turn_of_the_assistant_is_not_learned(name: str) -> None:
    source = {**ALL, "unstable, marked": UNSTABLE_MARKED}[name]
    template = ChatTemplate(chat_tokenizer(source))
    opening = {"role": "assistant", "content": "world"}
    parts = template.conversation([opening, *turns("hello", "fine", "how", "I am")])
    learned = [text for _, text in answers(parts)]
    assert len(learned) == 2
    assert not any("world" in template.tokenizer.decode(text) for text in learned)


@pytest.mark.parametrize("name", [*ALL, "unstable, marked"])
def test_an_answer_without_weight_is_read_and_not_learned(name: str) -> None:
    source = {**ALL, "unstable, marked": UNSTABLE_MARKED}[name]
    template = ChatTemplate(chat_tokenizer(source))
    messages = turns("hello", "fine", "how", "world", "hello", "I am")
    whole = template.conversation(messages)
    messages[3]["weight"] = 0
    parts = template.conversation(messages)
    assert [text for _, text in answers(parts)] == [
        text for _, text in answers(whole) if "world" not in template.tokenizer.decode(text)
    ]
    assert len(answers(parts)) == 2


ASKS = "<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("source", [SWITCHED, SWITCHED_OFF, SWITCHED_IN_PROMPT, SWITCHED_OTHERWISE])
def test_a_template_is_told_whether_the_assistant_may_think(source: str) -> None:
    own = ChatTemplate(chat_tokenizer(source))
    on, off = (own.asked(thinking=told) for told in (True, False))
    decode, messages = own.tokenizer.decode, turns("hello", "fine", "how", "I am")
    assert decode(on.prompt(messages[:1])).endswith(ASKS)
    assert decode(off.prompt(messages[:1])).endswith(ASKS + NO_THOUGHT)
    assert [decode(text) for _, text in answers(off.conversation(messages))] == [
        "fine<|im_end|>", "I am<|im_end|>",
    ]  # fmt: skip
    assert (decode(off.answer("fine")), off.end) == ("fine", own.end)
    messages[-1]["content"] = "<think>well</think>fine"
    *_, (prompt, answer) = answers(off.conversation(messages))
    assert decode(prompt).endswith(ASKS + NO_THOUGHT)
    assert decode(answer) == "fine<|im_end|>"
    *_, (prompt, answer) = answers(on.conversation(messages))
    assert decode(prompt).endswith(ASKS)
    assert decode(answer).startswith("<think>")
    assert "well" in decode(answer)
    assert [one.record().get("thinking") for one in (own, on, off)] == [None, "on", "off"]


def test_reasoning_before_a_call_is_left_out_and_an_answer_of_nothing_else_is_refused() -> None:
    off = ChatTemplate(chat_tokenizer(SWITCHED)).asked(thinking=False)
    call = {"type": "function", "function": {"name": "say", "arguments": {}}}
    thought = {"role": "assistant", "content": "<think>well</think>"}
    messages = [*turns("hello"), thought | {"tool_calls": [call]}]
    ((prompt, answer),) = answers(off.conversation(messages))
    assert off.tokenizer.decode(prompt).endswith(ASKS + NO_THOUGHT)
    assert off.tokenizer.decode(answer).startswith('[{"type": "function"')
    with pytest.raises(ChatTemplateError):
        off.conversation([*turns("hello"), thought])


def test_an_empty_thought_that_the_prompt_alone_has_is_learned_after_in_marked_templates() -> None:
    marked = SWITCHED_IN_PROMPT.replace(
        "message['content'] + '<|im_end|>\n' }}",
        "'' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    )
    off = ChatTemplate(chat_tokenizer(marked)).asked(thinking=False)
    ((prompt, answer),) = answers(off.conversation(turns("hello", "fine")))
    assert off.tokenizer.decode(prompt).endswith(ASKS + NO_THOUGHT)
    assert off.tokenizer.decode(answer) == "fine<|im_end|>"


def test_a_template_that_cannot_render_thoughts_is_not_told_to_ask_for_them() -> None:
    source = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{{ '</think>' }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{{ '<think>' if thinking else '</think>' }}{% endif %}"
    )
    template = ChatTemplate(chat_tokenizer(source))
    assert template.asked(thinking=True) is template
    assert template.asked(thinking=False) is not template


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("source", [*ALL.values(), None, "{# enable_thinking #}" + MARKED])
def test_a_template_without_a_switch_is_left_as_it_is(source: str | None, thinking: bool) -> None:
    template = ChatTemplate(chat_tokenizer(source))
    assert template.asked(thinking=thinking) is template


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_answers_in_a_row_are_one_or_the_one_that_is_learned(name: str) -> None:
    template = ChatTemplate(chat_tokenizer(ALL[name]))
    messages = turns("hello", "fine")
    again = {"role": "assistant", "content": "I am"}
    ((_, joined),) = answers(template.conversation([*messages, again]))
    assert template.tokenizer.decode(joined).startswith(("fine\n\nI am", " fine\n\nI am"))
    messages[-1]["weight"] = 0
    ((_, learned),) = answers(template.conversation([*messages, again]))
    assert template.tokenizer.decode(learned).strip().startswith("I am")


def test_several_templates_without_a_default_are_a_named_error() -> None:
    template = ChatTemplate(chat_tokenizer(None))
    template.tokenizer.chat_template, template.own = {"rag": ALL["chatml"]}, True
    with pytest.raises(ChatTemplateError, match="refused: ValueError"):
        template.prompt(turns("hello"))
    assert template.stop is None


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}",
                                    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])  # fmt: skip
def test_a_template_that_cannot_be_computed_is_a_named_error(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"refused: \w+Error"):
        ChatTemplate(chat_tokenizer(source)).conversation(turns("hello", "fine"))


# ── The templates that come with pretrained bases ───────────────────────────────────────────────


def check_template_of(folder: Path, otherwise: str | None = None) -> None:
    """Compare with renderings of transformers; ``otherwise`` is for a folder without a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or otherwise
    template = ChatTemplate(tokenizer)
    assert template.own
    messages = turns(
        "What is gravity?", "A force.\n\nIt pulls.",
        "Say <|im_end|> <end_of_turn>" if SANITIZES else "Say it", "No 🙂",
        "And\n\nmore?", "**Yes**: 1\n2", system="Be brief.",
    )  # fmt: skip
    (part,) = template.conversation(messages)
    special = {*tokenizer.all_special_ids, template.stop}
    for (start, end), i in zip(part.spans, (2, 4, 6), strict=True):
        before = tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, return_dict=False, **SANITIZED
        )
        assert list(part.ids[:start]) == before
        assert tokenizer.decode(part.ids[start : end - 1]) == messages[i]["content"]
        assert part.ids[end - 1] == template.stop
        assert not special & {*part.ids[start : end - 1]}


def test_the_template_of_smollm2(smollm2: Path) -> None:
    check_template_of(smollm2)


def test_the_template_of_gemma() -> None:
    if not (BASES / "gemma3" / "tokenizer.json").exists():
        pytest.skip(f"no gemma3 in {BASES}")
    # The pretrained Gemma has the tokens of turns, and the instruct model's template beside them.
    check_template_of(BASES / "gemma3", otherwise=GEMMA)
