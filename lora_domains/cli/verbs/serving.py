"""The verbs that let others use adapters. torch is imported late."""

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_domains.adapters.folder import folders_by_name
from lora_domains.cli.flags import add_base_flags, add_quiet_flag
from lora_domains.cli.machine import check_bases
from lora_domains.cli.parser import Verbs, add_adapter_argument, add_out_flag, add_verb
from lora_domains.cli.recipes import open_model
from lora_domains.console import Display
from lora_domains.errors import (
    AdapterMismatch,
    LoraDomainsError,
    UsageError,
    check_installed,
    did_you_mean,
)
from lora_domains.serving import network

if TYPE_CHECKING:
    from lora_domains.model import DomainModel

MOST_TOKENS = 256
"""Tokens of an answer in a chat at most, where neither the flags nor the domain say so."""
LIMITS: tuple[tuple[str, int | float, str], ...] = (
    ("--rows", 16, "maximum number of answers generated at once"),
    ("--queue", 64, "maximum number of waiting requests; others get 429"),
    ("--max-tokens", 1024, "maximum number of tokens of an answer"),
    ("--max-body", 1 << 20, "maximum size of a request in bytes"),
    ("--timeout", 600.0, "maximum seconds from the arrival of a request to the end of its answer"),
    ("--idle", 20.0, "seconds after which a client that sends or reads nothing is cut off"),
    ("--grace", 30.0, "seconds to finish answers in progress when the server stops"),
)
COMMANDS = {
    "/domain NAME": "answer as another adapter, in a new conversation",
    "/base": "answer as the base, without an adapter",
    "/reset": "begin a new conversation",
    "/quit": "leave, as Ctrl-D does",
}


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the parser."""
    _add_chat(verbs)
    _add_serve(verbs)


# ── serve ───────────────────────────────────────────────────────────────────────────────────────


def _add_serve(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "serve", serve, usage="[ADAPTER ...] [options]",
        description="Serve adapters on one base: /v1/chat/completions, /v1/completions and "
        "/v1/models as in OpenAI's API, where the model is the name of an adapter or of the base, "
        "and /v1/classify for labels. Requests for all of them are answered together, one batch "
        "for all adapters. SIGHUP reads adapters again that were trained again; SIGTERM or Ctrl-C "
        "stops when the answers in progress are finished. Writes no file; a line for each request, "
        "without its text, goes to the standard error (not with --quiet).\n\nIt needs an extra: "
        "pip install 'lora-domains[serve]'.",
        example="lora-domains serve adapters/*\n"
        "  lora-domains serve triage legal --port 8080 --api-key-file keys.txt",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, "adapters", nargs="*", help="their folders, or names in --out; "
                         "without any, the base of --base is served alone")  # fmt: skip
    add_base_flags(inputs, sharded=False)
    add_out_flag(inputs)
    inputs.add_argument("--slots", type=int, metavar="N", help="maximum number of adapters on the "
                        "device; default: all")  # fmt: skip
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--host", default="127.0.0.1", help="address to listen at, 0.0.0.0 for the network; "
        "default: %(default)s")  # fmt: skip
    add("--port", type=int, default=8000, help="port, 0 for a free one; default: %(default)s")
    add("--api-key", metavar="KEY", help="the key that clients send; better in a file or in the "
        f"environment ({network.KEY})")  # fmt: skip
    add("--api-key-file", metavar="FILE", help="keys, one a line")
    for flag, default, what in LIMITS:
        add(flag, type=type(default), default=default, metavar="N",
            help=f"{what}; default: {default:,.0f}")  # fmt: skip
    add_quiet_flag(output)


def serve(flags: argparse.Namespace) -> int:
    """Serve adapters until SIGTERM or Ctrl-C."""
    libraries = ("prometheus_client", "starlette", "uvicorn")
    check_installed("serve", "the libraries of a server", "serve", libraries)
    for flag, _, _ in LIMITS:
        value = getattr(flags, flag[2:].replace("-", "_"))
        if not value > 0:
            raise _too_small(flag, "a number above 0", value)
    keys = _keys(flags)
    folders = folders_by_name(flags.adapters, Path(flags.out))
    if not folders and not flags.base:
        raise UsageError(
            where="serve",
            expected="an adapter, or a base to serve alone",
            found="neither",
            hint="For example lora-domains serve adapters/*",
        )
    check_bases("serve", folders.values(), port=flags.port)
    bound = network.listening(flags.host, flags.port)
    with bound:
        stderr = Console(stderr=True, highlight=False, emoji=False)
        display = Display(console=stderr, brief=flags.quiet)
        first = next(iter(folders.values()), None)
        model = open_model(flags, display=display, adapter=first, slots=flags.slots)
        _serve(model, folders, keys, flags, bound)
    return 0


def _serve(
    model: "DomainModel", folders: dict[str, Path], keys: tuple[str, ...],
    flags: argparse.Namespace, bound: socket.socket,
) -> None:  # fmt: skip
    from lora_domains.serving.app import make_app
    from lora_domains.serving.service import Settings, make_service

    display = model.display
    settings = Settings(
        keys, flags.rows, flags.queue, flags.max_tokens, flags.max_body, flags.timeout, flags.idle
    )
    service = make_service(model, folders, settings, display.note)
    scheduler, name = service.scheduler, service.base_name

    def reload() -> None:
        for result in service.reload():
            display.line(f"{result['id']}: {result['status']} {result.get('error', '')}".rstrip())

    if flags.host not in network.LOOPBACK and not keys:
        display.warn("everybody in the network can ask: no key is set (--api-key-file).")
    if not scheduler.together:
        display.warn(f"{name} keeps states that cannot be put side by side: it answers one request "
                     "at a time.")  # fmt: skip
    display.line(f"Serving {', '.join([*folders, name])} at {network.url(flags.host, bound)}/v1; "
                 "Ctrl-C stops.")  # fmt: skip
    network.run(make_app(service), bound, idle=flags.idle, grace=flags.grace, on_hangup=reload)


def _keys(flags: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the flags, the file and the environment."""
    keys = [flags.api_key, os.environ.get(network.KEY)]
    if flags.api_key_file:
        try:
            keys += Path(flags.api_key_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                where="--api-key-file",
                expected="a readable file with a key in each line",
                found=getattr(error, "strerror", None) or "something else than text",
                hint="Check its path and its rights.",
            ) from None
    found = tuple(key.strip() for key in keys if key and key.strip())
    if not all(key.isascii() for key in found):
        raise UsageError(
            where="keys", expected="keys that a header can hold", found="other characters than "
            "those of ASCII", hint="Use letters and digits.",
        )  # fmt: skip
    if not found and (flags.api_key is not None or flags.api_key_file):
        raise UsageError(
            where="--api-key-file" if flags.api_key_file else "--api-key",
            expected="a key", found="an empty one", hint="Write one, or leave the flag out.",
        )  # fmt: skip
    return found


# ── chat ────────────────────────────────────────────────────────────────────────────────────────


def _add_chat(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "chat", chat, usage="[ADAPTER] [options]",
        description="Talk to an adapter, or without one to the base. Answers appear as they are "
        "generated; an adapter with labels answers with its label and the probability. Inside, "
        + "; ".join(f"{command}: {what}" for command, what in COMMANDS.items())
        + ". Ctrl-C stops an answer.\n\nWhere the standard input is no terminal, each of its lines "
        "is one message or command, and only the answers are printed. It writes no file.",
        example="lora-domains chat support\n  lora-domains chat --base Qwen/Qwen3-0.6B\n"
        '  echo "How do I reset my password?" | lora-domains chat support',
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, nargs="?")
    add_base_flags(inputs, sharded=False)
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--system", metavar="TEXT", help="the system's text, at the beginning of a conversation")
    add("--max-tokens", type=int, metavar="N", help="maximum number of tokens of an answer; "
        f"default: that of the domain, or {MOST_TOKENS}")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T", help="sample at this "
        "temperature; default: 0, which takes the most likely token")  # fmt: skip
    add("--seed", type=int, metavar="N", help="seed of the sampling; default: a new one each time")
    add_quiet_flag(output)


def chat(flags: argparse.Namespace) -> int:
    """Answer the messages of a terminal, or of the standard input."""
    if flags.max_tokens is not None and flags.max_tokens < 1:
        raise _too_small("--max-tokens", "at least 1", flags.max_tokens)
    if not 0 <= flags.temperature <= 2:
        raise _too_small("--temperature", "a number from 0 to 2", flags.temperature)
    stderr = Console(stderr=True, highlight=False, emoji=False)
    display = Display(console=stderr, brief=flags.quiet)
    model = open_model(flags, display=display, adapter=flags.adapter)
    name = None if flags.adapter is None else model.load_adapter(flags.adapter)
    talk = _Chat(model, name, flags)
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401 (input() edits lines with it)
        if not flags.quiet:
            sys.stdout.write("/help lists the commands, Ctrl-D leaves.\n")
    for line in _lines(talk):
        try:
            if line.startswith("/"):
                if not talk.command(line):
                    break
            elif line.strip():
                talk.reply(line.strip())
        except LoraDomainsError as error:
            if not sys.stdin.isatty():
                raise
            display.warn(str(error))
    return 0


def _too_small(flag: str, expected: str, found: float) -> UsageError:
    return UsageError(
        where=flag, expected=expected, found=str(found), hint="Leave it out for the default."
    )


def _lines(talk: "_Chat") -> Iterator[str]:
    """The lines that are typed, until Ctrl-D or Ctrl-C, or those of the standard input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            line = input(f"{talk.name or 'base'}> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        yield line


class _Chat:
    """A conversation with an adapter, or with the base where ``name`` is None."""

    def __init__(self, model: "DomainModel", name: str | None, flags: argparse.Namespace) -> None:
        from lora_domains.serving.batch import Batch

        self.model, self.name, self.flags = model, name, flags
        self._batch = None if model.base.bidirectional else Batch(model.base)
        self._reset()

    def _reset(self) -> None:
        system = self.flags.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> bool:
        """Carry out a command; whether to go on."""
        word, _, rest = line.strip().partition(" ")
        known = [command.partition(" ")[0] for command in COMMANDS]
        if word == "/help":
            width = max(map(len, COMMANDS))
            lines = [f"{command:<{width}}  {what}" for command, what in COMMANDS.items()]
            sys.stdout.write("\n".join(lines) + "\n")
        elif word not in known:
            raise UsageError(
                expected="a command", found=repr(word), hint=did_you_mean(word, [*known, "/help"])
            )
        elif word == "/domain":
            name = rest.strip()
            self.name = name if name in self.model.domains else self._loaded(name)
            self._reset()
        elif word in ("/base", "/reset"):
            self.name = None if word == "/base" else self.name
            self._reset()
        return word != "/quit"

    def _loaded(self, name: str) -> str:
        try:
            return self.model.load_adapter(name)
        except AdapterMismatch as error:
            hint = f"Talk to it in another chat: lora-domains chat {name}"
            raise AdapterMismatch(
                where=error.where, expected=error.expected, found=error.found, hint=hint
            ) from None

    def reply(self, text: str) -> None:
        """Write the answer to ``text``, piece by piece."""
        from lora_domains.serving import answers as prompts

        bank = self.model.bank
        if prompts.labels(bank, self.name):
            (answer,) = self.model.predict(text, self.name)
            chance = "" if isinstance(answer, str | float) else f"  {answer.line[1]}"
            self._write(f"{prompts.label_text(answer)}{chance}".rstrip() + "\n")
            return
        before = self.messages if prompts.converses(bank, self.name) else []
        turn = {"role": "user", "content": text}
        answered = self._generated([*before, turn])
        if answered.strip():
            self.messages = [*before, turn, {"role": "assistant", "content": answered}]

    def _generated(self, messages: list[dict[str, Any]]) -> str:
        """The answer, which is written as it is generated; Ctrl-C ends it."""
        from lora_domains.serving import answers as prompts
        from lora_domains.serving.answers import Sampling
        from lora_domains.serving.batch import Row

        prompt = prompts.conversation_prompt(self.model.bank, self.name, messages)
        assert self._batch is not None, "conversation_prompt refuses encoders"
        most = self.flags.max_tokens or prompt.max_new_tokens or MOST_TOKENS
        prompt = replace(prompt, max_new_tokens=most)
        length = prompts.answer_length(self.model.base, prompt, None, most)
        sampling = Sampling(
            length, self.flags.temperature, seed=self.flags.seed, stop=prompt.ends
        )  # fmt: skip
        answer = self._batch.answer(sampling, strip=True)
        route = self.model.bank.route(self.name)
        adapter = None if route is None else route.rows[0]
        try:
            self._batch.join([Row(prompt.ids, adapter, answer, self._write)])
            while self._batch.rows:
                self._batch.step()
        except KeyboardInterrupt:
            self._batch.clear()
        self._write("\n")
        return answer.text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
