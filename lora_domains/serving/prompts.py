"""What a model reads for a conversation or a text, by the domain that is to answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_domains.errors import ChatTemplateError, DataError, UsageError
from lora_domains.inference.predict import task_of
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import check_embedded, tokenization_of
from lora_domains.modeling.heads import check_generates
from lora_domains.tasks import Chat, Row, Task
from lora_domains.tasks.chat import messages_of
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization


@dataclass(frozen=True)
class Prompt:
    """The token ids to continue, and where the domain's answers end."""

    ids: tuple[int, ...]
    max_new_tokens: int | None = None
    """Tokens of an answer at most; None where the domain says nothing."""
    ends: tuple[str, ...] = ()


def messages_in(body: object) -> list[dict[str, Any]]:
    """The messages of a request; raises DataError for an unknown role or an empty content."""
    messages = messages_of(Row({"messages": body}, "input", 0, "the request"), "messages")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            where="messages",
            expected="a last message for the assistant to answer",
            found="one of the assistant",
            hint="End with a message of the user.",
        )
    return messages


def labels(bank: Bank, name: str | None) -> bool:
    """Whether the adapter ``name`` answers with labels or a number, rather than generated text."""
    if name is None or (bank[name].card is None and bank[name].head is None):
        return False
    return bank[name].head is not None or task_of(bank, name).max_new_tokens == 0


def conversation_prompt(
    bank: Bank, name: str | None, messages: Sequence[Mapping[str, Any]]
) -> Prompt:
    """The prompt of a conversation for the adapter ``name``, or for the base (None).

    An adapter reads what it was trained on: turns in the chat template, or one text in the prompt
    of its task. Raises UsageError where it answers no conversation, ChatTemplateError where the
    base has no template, and DataError for messages that cannot be rendered.
    """
    base = bank.base
    check_generates(base)
    trained = name is not None and bank[name].card is not None
    task: Task = task_of(bank, name) if trained and name is not None else Chat()
    if not trained and not base.chat_template.own:
        raise ChatTemplateError(
            where=base.id,
            expected="a base with a chat template",
            found="none in its tokenizer",
            hint="Use an adapter that was trained on chats, or a base that was. A server also "
            "continues plain prompts (/v1/completions).",
        )
    example = task.to_answer(messages)
    tokenization = tokenization_of(base, task, base.context)
    ids = (*tokenization.start, *tokenization.prompt_tokens(example))
    check_embedded(base, [("messages", EncodedExample("", ids, ()))])
    return Prompt(ids, (task.max_new_tokens or None) if trained else None, task.ends)


def converses(bank: Bank, name: str | None) -> bool:
    """Whether ``name`` reads earlier turns of a conversation too."""
    return name is None or bank[name].card is None or task_of(bank, name).converses


def answer_length(base: Base, prompt: Prompt, asked: int | None, most: int) -> int:
    """Tokens of an answer at most: those ``asked`` for, or what domain and context leave of
    ``most``.

    Raises UsageError for more than ``most``, or a prompt and an answer beyond the context.
    """
    if asked is not None and asked > most:
        raise UsageError(
            where="max_tokens",
            expected=f"at most {most}, the limit of this server",
            found=str(asked),
            hint="Ask for less; its owner can raise --max-tokens.",
        )
    room = base.context - len(prompt.ids)
    if room < (asked or 1):
        raise UsageError(
            where="max_tokens" if room > 0 else "messages",
            expected=f"prompt and answer within the base's context of {base.context} tokens",
            found=f"a prompt of {len(prompt.ids)} tokens"
            + (f" and an answer of {asked}" if asked else ""),
            hint=f"Ask for at most {room}." if room > 0 else "Shorten the prompt.",
        )
    return asked or min(prompt.max_new_tokens or most, most, room)


def text_prompt(bank: Bank, name: str | None, text: str | Sequence[int]) -> Prompt:
    """The prompt that ``text`` is, or token ids; special tokens in a text are what they spell.

    Raises UsageError for a base or an adapter that generates no text, DataError for a token that
    the base lacks, or no tokens at all.
    """
    base = bank.base
    check_generates(base)
    if name is not None and bank[name].head is not None:
        raise UsageError(
            where=name,
            expected="an adapter that generates text",
            found="one with a classification head",
            hint="Send its texts to /v1/classify.",
        )
    if isinstance(text, str):
        tokenization = Tokenization(base.tokenizer, base.context)
        ids = (*tokenization.bos, *tokenization.tokens(text, special=True))
    else:
        ids = tuple(text)
    places = base.model.get_input_embeddings().num_embeddings
    if not ids or not all(0 <= token < places for token in ids):
        raise DataError(
            where="prompt",
            expected=f"tokens from 0 to {places - 1}",
            found="another token" if ids else "an empty text",
            hint="Tokenise it with the tokenizer of the base." if ids else "Write a prompt.",
        )
    return Prompt(ids)
