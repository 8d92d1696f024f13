"""A base's chat template: a conversation as tokens, and which of them the assistant wrote.

Where an answer begins and ends is found by rendering the conversation up to it: the prompt before
the answer, and the answer with the end of its turn, must both be prefixes of the whole, as text and
as tokens. This is what the base reads when it answers. Where a template renders an earlier answer
otherwise than the last one (without its reasoning, for example), the marks of the template decide
(``{% generation %}``); without marks, that answer is encoded again in the rendering in which it is
the last.

The names of special tokens in the text of a conversation are text. A date that a template reads
from the clock is fixed, so that a run can be repeated.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

from lora_domains.errors import ChatTemplateError
from lora_domains.tasks.answers import reasons
from lora_domains.tasks.messages import Message
from lora_domains.tasks.rows import answer_places, answers_in
from lora_domains.tokenization.encoded import shared
from lora_domains.tokenization.special_tokens import SpecialTokens
from lora_domains.tokenization.turns import (
    PLAIN,
    SWITCHES,
    roles,
    says_all,
    switches,
    variants,
    without_thoughts,
)

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
DAY = date(2024, 7, 26)
"""What templates read from the clock; Llama 3's own default."""
SAMPLE = "yes"
"""The answer from which the end of a turn is learned."""
SAMPLE_TURNS = {"role": "user", "content": "?"}, {"role": "assistant", "content": SAMPLE}


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation, with the tokens that the assistant wrote."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """[start, end) of each answer in ``ids``; the end of its turn is its last token."""


@dataclass(frozen=True)
class _Answer:
    """An answer in the rendering that ends with it."""

    prompt: str
    text: str
    """Prompt and answer, up to the end of the turn."""
    closed: bool
    """Whether a special token ends the turn."""
    specials: int
    """How many special tokens the answer has, the end among them."""
    spliced: bool = False
    """Whether its prompt ends with an empty thought that its rendering lacks."""


class ChatTemplate:
    """Renders conversations for one tokenizer, by its own template or by ``PLAIN``.

    ``thinking`` is what a template is told about reasoning before an answer, if it asks (as Qwen3's
    does, which has the assistant think by default); without it answers are rendered without theirs.

    ``messages`` are turns with a ``role`` and a ``content``; ``tools`` are JSON schemas of the
    functions that the assistant may call; ``where`` names the row in errors. Methods raise
    ChatTemplateError for a conversation that cannot be rendered.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.own = bool(getattr(tokenizer, "chat_template", None))
        self.adapted = 0
        """Conversations whose turns were joined because the template refuses them as they are."""
        self.thinking = thinking
        self.options = {} if thinking is None else switches(thinking)
        """What the template is told."""
        self._asked: dict[bool, ChatTemplate] = {}
        self._special = SpecialTokens(tokenizer)
        self._ids = self._special.encode
        self._sources: dict[bool, str] = {}

    def record(self) -> dict[str, str]:
        """The ``chat`` entry of a card: whose template it is, and its digest."""
        source = self.tokenizer.chat_template if self.own else PLAIN
        digest = sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        told = {} if self.thinking is None else {"thinking": "on" if self.thinking else "off"}
        return {"template": "own" if self.own else "plain", "sha256": digest, **told}

    def asked(self, *, thinking: bool) -> "ChatTemplate":
        """This template told whether the assistant may think first; itself where that changes
        nothing, or where answers cannot be rendered then."""
        if thinking not in self._asked:
            made, other = (
                ChatTemplate(self.tokenizer, thinking=is_) for is_ in (thinking, not thinking)
            )
            self._asked[thinking] = made if self._differ(made, other) else self
        return self._asked[thinking]

    def _differ(self, made: "ChatTemplate", other: "ChatTemplate") -> bool:
        if not self.own or not any(switch in self.source() for switch in SWITCHES):
            return False
        asked = SAMPLE_TURNS[:1]
        try:
            return made.prompt(asked) != other.prompt(asked) and bool(made.end)
        except ChatTemplateError:
            return False

    # ── Token ids ───────────────────────────────────────────────────────────────────────────────

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), where: str = ""
    ) -> tuple[int, ...]:
        """The token ids of a conversation that the assistant is to continue."""
        messages, tools = self._accepted(messages, tools, where)
        return self._ids(self._render(messages, tools, where, prompt=True))[0]

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), where: str = "",
        learned: int | None = None,
    ) -> list[Conversation]:  # fmt: skip
        """A conversation with its answers, in one or several renderings, each answer in one.

        ``learned`` answers at the end have spans, by default all to the user or a tool.
        """
        messages, tools = self._accepted(messages, tools, where)
        places = answers_in(messages)
        places = places[-learned:] if learned else places
        whole = self._render(messages, tools, where)
        answers = [self._answer(messages[: i + 1], tools, where) for i in places]
        if answers and answers[-1] is not None and whole.startswith(answers[-1].text):
            whole = answers[-1].text  # what follows the last answer is not read
        ids, *prompts = self._ids(whole, *(answer.prompt if answer else "" for answer in answers))
        spans: list[tuple[int, int]] = []
        alone: list[_Answer | None] = []
        closed = True
        for place, answer, prompt in zip(places, answers, prompts, strict=True):
            end = None
            if answer and whole.startswith(answer.text) and ids[: len(prompt)] == prompt:
                end = self._end(ids, len(prompt), answer)
            if answer is None or end is None:
                alone.append(answer)
                continue
            spans.append((len(prompt), end))
            closed = answer.closed or place + 1 < len(messages)
        spliced = any(answer is not None and answer.spliced for answer in alone)
        if alone and not spliced and GENERATION.search(self.source(tools)):
            return [self._marked(messages, tools, where, places)]
        found = [self._alone(answer, where) for answer in alone]
        return [*found, self._ended(ids, spans, closed)] if spans else found

    def answer(self, text: str) -> tuple[int, ...]:
        """The token ids of an answer after a prompt, without the end of its turn."""
        answer = self._sampled(text)
        whole = answer.text[: len(answer.text) - len(self._tail)]
        prompt, ids = self._ids(answer.prompt, whole)
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        return self._ids(whole[len(answer.prompt) :])[0]

    @cached_property
    def end(self) -> tuple[int, ...]:
        """The token ids of the end of a turn, with which an answer ends."""
        sample = self._sampled(SAMPLE)
        if not sample.closed:
            return (self.tokenizer.eos_token_id,)
        before, whole = self._ids(sample.text[: len(sample.text) - len(self._tail)], sample.text)
        return whole[len(before) :]

    @cached_property
    def stop(self) -> int | None:
        """The special token that ends a turn; None where the template renders no turns."""
        try:
            end = self.end
        except ChatTemplateError:
            return None
        return next((token for token in end if token in self._special.ids), end[-1])

    @cached_property
    def _tail(self) -> str:
        """What the template writes after an answer, up to the end of the turn."""
        text = self._sampled(SAMPLE).text
        return text[text.rfind(SAMPLE) + len(SAMPLE) :]

    def _sampled(self, text: str) -> _Answer:
        turns = [SAMPLE_TURNS[0], {"role": "assistant", "content": text}]
        (turns, _), where = self._accepted(turns, (), ""), "the chat template of the base"
        answer = self._answer(turns, (), "")
        if answer is not None:
            return answer
        if not GENERATION.search(self.source()):
            raise self._unstable(where)
        whole, ((start, end),) = self._marks(turns, (), where)
        specials = list(self._special.names.finditer(whole, start, end))
        closed = bool(specials) and specials[-1].end() == end
        return _Answer(whole[:start], whole[:end], closed, len(specials))

    # ── Answers ─────────────────────────────────────────────────────────────────────────────────

    def _answer(
        self, messages: Sequence[Message], tools: Sequence[Any], where: str
    ) -> _Answer | None:
        """The last of ``messages``; None where its rendering does not begin with its prompt."""
        spliced = False
        try:
            prompt = self._render(messages[:-1], tools, where, prompt=True)
            text = self._render(messages, tools, where)
            if self.thinking is False and not text.startswith(prompt):
                # Some write an empty thought into the prompt alone.
                open_ = self._render(messages[:-1], tools, where, prompt=True, thinking=True)
                rest = text.removeprefix(open_)
                if prompt.startswith(open_) and rest != text and not reasons(rest):
                    text, spliced = prompt + rest, True
        except ChatTemplateError:
            return None
        if not text.startswith(prompt):
            return None
        turn = text[len(prompt) :]
        specials = list(self._special.names.finditer(turn))
        closed = bool(specials) and not turn[specials[-1].end() :].strip()
        turn = turn[: specials[-1].end()] if closed else turn.rstrip()
        return _Answer(prompt, prompt + turn, closed, len(specials), spliced)

    def _end(self, ids: tuple[int, ...], start: int, answer: _Answer) -> int | None:
        """Where the tokens of ``answer`` end, which start at ``start`` of ``ids``; None where a
        token reaches over its end."""
        if not answer.closed:
            (before,) = self._ids(answer.text)
            return len(before) if ids[: len(before)] == before else None
        places = [i for i in range(start, len(ids)) if ids[i] in self._special.ids]
        return places[answer.specials - 1] + 1

    def _alone(self, answer: _Answer | None, where: str) -> Conversation:
        """An answer in its own rendering."""
        if answer is None:
            raise self._unstable(where)
        prompt, ids = self._ids(answer.prompt, answer.text)
        if ids[: len(prompt)] != prompt:  # a token reaches over the end of the prompt
            ids = prompt + self._ids(answer.text[len(answer.prompt) :])[0]
        return self._ended(ids, [(len(prompt), len(ids))], answer.closed)

    def _ended(
        self, ids: tuple[int, ...], spans: Sequence[tuple[int, int]], closed: bool
    ) -> Conversation:
        """The tokens up to the last answer, and its end where the template writes none."""
        *others, (start, end) = spans
        ids = ids[:end]
        if not closed:
            ids, end = (*ids, self.tokenizer.eos_token_id), end + 1
        return Conversation(ids, (*others, (start, end)))

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[Any], where: str, places: Sequence[int]
    ) -> Conversation:
        """The answers at ``places`` as the template marks them, each with the end of its turn."""
        text, marks = self._marks(messages, tools, where)
        answers = answer_places(messages)  # a template may leave out the first of them
        numbers = [answers.index(place) + len(marks) - len(answers) for place in places]
        if numbers[0] < 0:
            raise self._unstable(where)
        marks = [marks[number] for number in numbers]
        ids, *before = self._ids(text, *(text[:edge] for mark in marks for edge in mark))
        places = [shared(part, ids) for part in before]
        spans = list(zip(places[::2], places[1::2], strict=True))
        return self._ended(ids, spans, ids[spans[-1][1] - 1] in self._special.ids)

    def _marks(
        self, messages: Sequence[Message], tools: Sequence[Any], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """A rendering, and [start, end) of what the template marks in it, each with the special
        token that follows, where it ends without one."""
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), (found,) = render_jinja_template(
            conversations=[[dict(message) for message in messages]], tools=list(tools) or None,
            chat_template=self.source(tools), return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map, **self.options,
        )  # fmt: skip
        if not found:
            raise self._unstable(where)
        marks = []
        for start, end in found:
            inside = list(self._special.names.finditer(text, start, end))
            after = self._special.names.match(text, end)
            ended = bool(inside) and inside[-1].end() == end
            marks.append((start, after.end() if after and not ended else end))
        return text, marks

    def _unstable(self, where: str) -> ChatTemplateError:
        return ChatTemplateError(
            where=where,
            expected="a chat template that renders an answer after the prompt that asks for it",
            found="an answer whose rendering begins otherwise, and no marks",
            hint="Mark what the assistant writes in the base's chat template: "
            "{% generation %}…{% endgeneration %}.",
        )

    # ── Rendering ───────────────────────────────────────────────────────────────────────────────

    def _accepted(
        self, messages: Sequence[Message], tools: Sequence[Any], where: str
    ) -> tuple[list[dict[str, Any]], Sequence[Any]]:
        """Messages and tools as the template takes them, with the names of special tokens broken.

        A template may have no system role, demand that roles alternate or that the user begins, or
        have no calls of functions: the system's text is then put before the user's, turns of one
        role become one, an opening turn of the assistant is left out, and calls become text.
        """
        if self.thinking is False:
            messages = without_thoughts(messages)
        guarded = self._special.guarded
        wanted = [
            {key: guarded(value) for key, value in message.items() if value is not None}
            for message in messages
        ]
        error: ChatTemplateError | None = None
        silent: tuple[list[dict[str, Any]], Sequence[Any]] | None = None
        for n, variant in enumerate(variants(wanted, guarded(tools))):
            prompt = variant[0][-1]["role"] != "assistant"
            try:
                if says_all(partial(self._render, where=where, prompt=prompt), *variant):
                    self.adapted += n > 0
                    return variant
            except ChatTemplateError as refused:
                error = error or refused
                continue
            silent = silent or variant
        if silent is None:
            raise error or self._unstable(where)
        return silent

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], where: str, *,
        prompt: bool = False, thinking: bool | None = None,
    ) -> str:  # fmt: skip
        from jinja2 import TemplateError

        source = ""
        try:
            source = self.source(tools)
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=list(tools) or None,
                chat_template=source, add_generation_prompt=prompt, tokenize=False,
                **(self.options if thinking is None else switches(thinking)),
            )  # fmt: skip
        except (
            TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RecursionError,
        ) as error:  # fmt: skip
            # A message that the template writes itself quotes no row.
            own = str(error) if isinstance(error, TemplateError) and str(error) in source else ""
            raise ChatTemplateError(
                where=where,
                expected="a conversation that the base's chat template accepts",
                found=f"roles {', '.join(roles(messages))}, refused: {own or type(error).__name__}",
                hint="Change the roles or their order, or choose a base whose template has them.",
            ) from None
        return text

    @property
    def plain(self) -> str:
        """``PLAIN``, which begins as a text of the tokenizer does."""
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return "{{ bos_token }}" + PLAIN if begins else PLAIN

    def source(self, tools: Sequence[Any] = ()) -> str:
        """The template's text, with a fixed date."""
        key = bool(tools)
        if key not in self._sources:
            source = self.plain
            if self.own:
                source = self.tokenizer.get_chat_template(tools=list(tools) or None)
            self._sources[key] = CLOCK.sub(lambda m: repr(DAY.strftime(m[2])), source)
        return self._sources[key]
