"""Requests and answers in the shapes of OpenAI's API, and requests as jobs. No torch.

A field that would change the answer and is not supported is refused by its name, so that no client
believes that it had an effect.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import format_tb
from typing import TYPE_CHECKING, Any, NoReturn

from lora_domains.errors import LoraDomainsError, TrainingError, did_you_mean, listed
from lora_domains.tokenization.turns import SWITCHES

if TYPE_CHECKING:
    from lora_domains.inference.predict import Answer

LOG = logging.getLogger("lora_domains.serving")
MOST_ANSWERS, MOST_STOPS, MOST_TEXTS = 64, 16, 1024
"""Answers, texts that end one, and texts to label, in one request at most."""
LONGEST_STOP = 200
"""Characters of a text that ends an answer: each new token is compared with all its beginnings."""
IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that change no answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "response_format": ({"type": "text"},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "store": (False,), "service_tier": ("auto", "default"),
    "echo": (False,), "best_of": (1,), "suffix": ("",), "modalities": (["text"],),
}  # fmt: skip
"""Fields of OpenAI that are not supported, and their values that change no answer."""


class ApiError(Exception):
    """An answer with an error: its status, and what is wrong with which field."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind, self.headers = kind, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param,
                          "code": self.code}}  # fmt: skip


def failed(error: Exception) -> ApiError:
    """The answer to a request that failed here; what the error says may quote its text."""
    what = f"The server could not answer ({type(error).__name__})."
    return ApiError(500, what, kind="server_error")


def queue_full(seconds: int) -> ApiError:
    """The answer to a request for which there is no room, but may be in ``seconds``."""
    what = f"The queue is full. Try again in {seconds} s."
    return ApiError(429, what, kind="rate_limit_error", code="queue_full",
                    headers={"Retry-After": str(seconds)})  # fmt: skip


def stopping() -> ApiError:
    """The answer to a request that a server no longer carries out."""
    return ApiError(503, "The server is stopping.", kind="server_error")


def log(what: str, error: Exception) -> None:
    """Write where an error was raised to the log, without its message, for the same reason."""
    LOG.error("%s %s\n%s", what, type(error).__name__, "".join(format_tb(error.__traceback__)))


def refused(error: LoraDomainsError) -> ApiError:
    """The answer to a request that this package cannot carry out."""
    if isinstance(error, TrainingError):  # no memory
        return failed(error)
    code = "context_length_exceeded" if "context of" in error.expected else None
    fields = ("messages", "prompt", "max_tokens", "input", "chat_template_kwargs")
    param = next((name for name in fields if name in error.where), None)
    return ApiError(400, str(error), param=param, code=code)


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; raises ApiError for anything else."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}, column {error.colno}" if isinstance(
            error, json.JSONDecodeError) else ""  # fmt: skip
        raise ApiError(400, f"The body is no valid JSON{place}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"Expected a JSON object, found {_kind(found)}.", code="invalid_json")
    return found


# ── Fields ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Field:
    """What a field may be: a test, and its description."""

    holds: Callable[[Any], bool]
    expected: str


def _whole(low: int, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not _is_bool(value) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not _is_bool(v) and low <= v <= high


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(
        isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in texts
    )  # fmt: skip


def _is_prompt(value: Any) -> bool:
    texts = prompts_of(value)
    return bool(texts) and all(_is_text(one) or _is_tokens(one) for one in texts)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_whole(0, 2**31), value))


def _is_stream_options(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key == "include_usage" and isinstance(given, bool) for key, given in value.items()
    )


def _is_input(value: Any) -> bool:
    rows = value if isinstance(value, list) else [value]
    return 0 < len(rows) <= MOST_TEXTS and all(isinstance(row, str | dict) for row in rows)


def _is_switch(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {*SWITCHES}
        and all(map(_is_bool, value.values()))
    )


MODEL = {"model": _Field(_is_text, "the name of a model")}
SAMPLED = MODEL | {
    "max_tokens": _Field(_whole(1, 2**31), "a whole number, at least 1"),
    "temperature": _Field(_number(0, 2), "a number from 0 to 2"),
    "top_p": _Field(lambda v: _number(0, 1)(v) and v > 0, "a number above 0, at most 1"),
    "n": _Field(_whole(1, MOST_ANSWERS), f"a whole number from 1 to {MOST_ANSWERS}"),
    "stop": _Field(
        _is_stop,
        f"a text, or at most {MOST_STOPS} texts, none of them empty or longer than "
        f"{LONGEST_STOP} characters",
    ),
    "seed": _Field(_whole(-(2**63), 2**63 - 1), "a whole number"),
    "stream": _Field(_is_bool, "true or false"),
    "stream_options": _Field(_is_stream_options, '{"include_usage": true}'),
}
CHAT = SAMPLED | {
    "messages": _Field(lambda value: isinstance(value, list) and bool(value), "a list of messages"),
    "max_completion_tokens": SAMPLED["max_tokens"],
    "chat_template_kwargs": _Field(_is_switch, 'like {"enable_thinking": false}'),
}
COMPLETION = SAMPLED | {
    "prompt": _Field(_is_prompt, "a text, token ids, or a list of them, not empty"),
}
CLASSIFY = MODEL | {
    "input": _Field(_is_input, f"a text or a row, or up to {MOST_TEXTS} of them in a list"),
    "refer_below": _Field(_number(0, 1), "a number from 0 to 1"),
}


def checked(body: Mapping[str, Any], fields: Mapping[str, _Field], *needed: str) -> dict[str, Any]:
    """The fields of ``body`` that are given; raises ApiError for one that cannot be used."""
    for name in ("model", *needed):
        if body.get(name) is None:
            raise ApiError(400, f"The field {name!r} is missing.", param=name,
                           code="missing_required_parameter")  # fmt: skip
    given = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        field = fields.get(name)
        if field is None:
            if not any(value == neutral and _is_bool(value) == _is_bool(neutral)
                       for neutral in NEUTRAL.get(name, ())):  # fmt: skip
                raise _unsupported(name, fields)
            continue
        if not field.holds(value):
            raise ApiError(
                400, f"Expected {field.expected} as {name!r}, found {_kind(value)}.", param=name,
                code="invalid_value",
            )  # fmt: skip
        given[name] = value
    return given


def _unsupported(name: str, fields: Mapping[str, _Field]) -> ApiError:
    name = name[:64].encode("utf-8", "replace").decode()
    rest = "Leave it out." if name in NEUTRAL else did_you_mean(name, fields)
    return ApiError(400, f"The field {name!r} is not supported here. {rest}", param=name,
                    code="unsupported_parameter")  # fmt: skip


def most_tokens(given: Mapping[str, Any]) -> int | None:
    """The most tokens of an answer that a chat asks for, under either name."""
    both = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(set(both)) > 1:
        raise ApiError(400, "max_completion_tokens and max_tokens differ; give one of them.",
                       param="max_tokens", code="invalid_value")  # fmt: skip
    return both[0] if both else None


def prompts_of(prompt: Any) -> list[Any]:
    """The prompts of a completion, each a text or token ids."""
    return prompt if isinstance(prompt, list) and not _is_tokens(prompt) else [prompt]


def unknown_model(name: str, known: list[str]) -> ApiError:
    message = f"The model {name[:64]!r} does not exist here. Known: {listed(known, 20)}."
    return ApiError(404, message, param="model", code="model_not_found")


def _kind(value: Any) -> str:
    """What a value is, without its text."""
    if isinstance(value, bool | None):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.6g}" if abs(value) < 1e15 else "a large number"
    name = "text" if isinstance(value, str) else "list" if isinstance(value, list) else "object"
    return f"{'an empty' if not value else 'an' if name == 'object' else 'a'} {name}"


# ── Jobs, and what is told of them ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Begun:
    """A request was accepted; its prompts have so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """Text of the answer ``index`` that became certain."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """An answer is finished, because of ``reason``."""

    index: int
    text: str
    reason: str
    tokens: int


@dataclass(frozen=True)
class Labelled:
    """All texts of a request are answered."""

    answers: "list[Answer]"


@dataclass(frozen=True)
class Failed:
    """A request cannot be answered."""

    error: Exception


Event = Begun | Piece | Ended | Labelled | Failed


@dataclass(eq=False)
class Job:
    """A request of the domain ``name`` (None is the base); ``deliver`` is called with each event,
    on the scheduler's thread. ``cancelled`` ones are dropped before the next step."""

    name: str | None
    deliver: Callable[[Event], None]
    cancelled: bool = field(default=False, init=False)


@dataclass(eq=False)
class Generate(Job):
    """Continue a conversation, or plain ``texts`` (or their token ids), each ``count`` times."""

    messages: Sequence[Mapping[str, Any]] | None = None
    texts: Sequence[str | Sequence[int]] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    count: int = 1
    stream: bool = False
    thinking: bool | None = None
    """What the chat template is told about reasoning before the answer."""


@dataclass(eq=False)
class Label(Job):
    """Label ``texts``."""

    texts: Sequence[str | Mapping[str, Any]]
    refer_below: float = 0.0


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Shape:
    """The JSON of one answer, a chat or a completion, whole or in pieces."""

    model: str
    chat: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        named = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": named,
            "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    def choice(self, event: Ended) -> dict[str, Any]:
        text: dict[str, Any] = {"text": event.text}
        if self.chat:
            text = {"message": {"role": "assistant", "content": event.text, "refusal": None}}
        return {"index": event.index, **text, "logprobs": None, "finish_reason": event.reason}

    def piece(
        self, index: int, text: str, reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        part: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"content": text} if text or first else {}
            part = {"delta": {"role": "assistant", **said} if first else said}
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        return self.body([choice], chunk=True)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion}  # fmt: skip


def sent(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def record(answer: "Answer") -> dict[str, Any]:
    return {"prediction": answer} if isinstance(answer, str | float) else answer.record
