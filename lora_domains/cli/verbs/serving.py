"""The verbs that let others use adapters. torch is imported late."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_domains.cli.flags import add_adapter_argument, add_base_flags, add_out_flag
from lora_domains.cli.parser import Verbs, add_verb
from lora_domains.cli.recipes import open_model
from lora_domains.console import Display
from lora_domains.errors import LoraDomainsError, UsageError, did_you_mean

if TYPE_CHECKING:
    from lora_domains.model import DomainModel

MOST_TOKENS = 256
"""Tokens of an answer in a chat at most, where neither the flags nor the domain say so."""
COMMANDS = {
    "/domain NAME": "answer as another adapter, in a new conversation",
    "/base": "answer as the base, without an adapter",
    "/reset": "begin a new conversation",
    "/quit": "leave, as Ctrl-D does",
}


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs to the parser."""
    _add_chat(verbs)


# ── chat ────────────────────────────────────────────────────────────────────────────────────────


def _add_chat(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "chat", chat, usage="[ADAPTER] [options]",
        description="Talk to an adapter, or without one to the base. Answers appear as they are "
        "generated; an adapter with labels answers with its label and the probability. Inside, "
        + "; ".join(f"{command}: {what}" for command, what in COMMANDS.items())
        + ". Ctrl-C stops an answer.\n\nWhere the standard input is no terminal, each of its lines "
        "is one message, and only the answers are printed. It writes no file.",
        example="lora-domains chat support\n  lora-domains chat --base Qwen/Qwen3-0.6B\n"
        '  echo "How do I reset my password?" | lora-domains chat support',
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, nargs="?")
    add_base_flags(inputs)
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--system", metavar="TEXT", help="the system's text, at the beginning of a conversation")
    add("--max-tokens", type=int, metavar="N", help="most tokens of an answer; default: those of "
        f"the domain, or {MOST_TOKENS}")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T", help="draw tokens at this "
        "temperature; default: 0, the most likely token")  # fmt: skip
    add("--seed", type=int, metavar="N", help="of the drawn tokens; default: another each time")


def chat(flags: argparse.Namespace) -> int:
    """Answer the messages of a terminal, or of the standard input."""
    if flags.max_tokens is not None and flags.max_tokens < 1:
        raise _too_small("--max-tokens", "at least 1", flags.max_tokens)
    if not 0 <= flags.temperature <= 2:
        raise _too_small("--temperature", "a number from 0 to 2", flags.temperature)
    display = Display(console=Console(stderr=True, highlight=False))
    model = open_model(flags, display=display, adapter=flags.adapter)
    name = None if flags.adapter is None else model.load_adapter(flags.adapter)
    talk = _Chat(model, name, flags)
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() edits lines with it)

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
            self.name = name if name in self.model.domains else self.model.load_adapter(name)
            self._reset()
        elif word in ("/base", "/reset"):
            self.name = None if word == "/base" else self.name
            self._reset()
        return word != "/quit"

    def reply(self, text: str) -> None:
        """Write the answer to ``text``, piece by piece."""
        from lora_domains.serving import prompts

        bank = self.model.bank
        if prompts.labels(bank, self.name):
            (answer,) = self.model.predict(text, self.name)
            cells = [f"{answer:.6g}"] if isinstance(answer, float) else [answer]
            self._write("  ".join(map(str, cells if isinstance(answer, str | float)
                                      else filter(None, answer.line))) + "\n")  # fmt: skip
            return
        before = self.messages if prompts.converses(bank, self.name) else []
        turn = {"role": "user", "content": text}
        answered = self._generated([*before, turn])
        if answered.strip():
            self.messages = [*before, turn, {"role": "assistant", "content": answered}]

    def _generated(self, messages: list[dict[str, Any]]) -> str:
        """The answer, which is written as it is generated; Ctrl-C ends it."""
        from lora_domains.serving import prompts
        from lora_domains.serving.answers import Sampling
        from lora_domains.serving.batch import Row

        prompt = prompts.conversation_prompt(self.model.bank, self.name, messages)
        assert self._batch is not None, "conversation_prompt refuses encoders"
        most = self.flags.max_tokens or prompt.max_new_tokens or MOST_TOKENS
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
