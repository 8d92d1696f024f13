"""The verb chat: a conversation in a terminal, or with lines of the standard input."""

import io
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_base
from support.adapters import save, strong
from support.chat_templates import CHATML
from support.commands import run
from support.models import Fitted
from support.served import save_task

from lora_domains.cli.verbs import serving
from lora_domains.model import DomainModel
from lora_domains.serving.batch import Batch
from lora_domains.tasks import Generation


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with a chat template."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "chat", max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapters(chat_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain PEFT folders of adapters with an effect."""
    out = tmp_path_factory.mktemp("adapters")
    base = DomainModel.from_pretrained(chat_base, device="cpu").base
    for seed, name in enumerate(("first", "second")):
        save(out / name, strong(base, name, seed), base)
        (out / name / "card.json").unlink()
    return out


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def keyed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> list[str]:
    """Let a person type ``lines`` in a terminal; returns the prompts that are shown."""
    prompts, waiting = [], list(lines)

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        line = waiting.pop(0) if waiting else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", _Terminal())
    monkeypatch.setattr("builtins.input", answer)
    return prompts


def test_lines_are_answered_as_by_the_model(
    chat_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    where = ("--base", str(chat_base), "--out", str(adapters), "--max-tokens", "8")
    typed(monkeypatch, "the red river", "", "/domain second", "the red river", "/base",
          "the red river", "/quit", "never")  # fmt: skip
    assert run("chat", "first", *where) == 0
    found = capsys.readouterr().out
    model = DomainModel.from_pretrained(chat_base, device="cpu", out=adapters)
    prompt = "<|im_start|>user\nthe red river<|im_end|>\n<|im_start|>assistant\n"
    wanted = ""
    for name in ("first", "second", None):
        if name is not None:
            model.load_adapter(name)
        wanted += str(model.generate(prompt, name, max_new_tokens=8)).strip() + "\n"
    assert found == wanted


def test_a_conversation_goes_on_until_it_is_reset(
    chat_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    read = []
    join = Batch.join
    monkeypatch.setattr(Batch, "join", lambda batch, rows: (
        read.extend(batch.base.tokenizer.decode(row.prompt) for row in rows), join(batch, rows)
    ))  # fmt: skip
    typed(monkeypatch, "red", "blue", "/reset", "green")
    where = ("--base", str(chat_base), "--out", str(adapters), "--max-tokens", "6")
    assert run("chat", "first", *where, "--system", "text") == 0
    first = capsys.readouterr().out.split("\n")[0]
    assert first
    assert read[0].startswith("<s><|im_start|>system\ntext<|im_end|>\n<|im_start|>user\nred")
    assert f"assistant\n{first}<|im_end|>\n<|im_start|>user\nblue" in read[1]
    assert "red" not in read[2]
    assert "system\ntext" in read[2]


def test_labels_are_answered_with_their_probability(
    fitted: Fitted, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    typed(monkeypatch, "river alpha alpha alpha", "river beta beta beta")
    assert run("chat", "spam", "--base", str(tiny_base), "--out", str(fitted[0].out)) == 0
    out = capsys.readouterr().out
    wanted = fitted[0].predict(["river alpha alpha alpha", "river beta beta beta"], "spam")
    assert out == "".join("  ".join(answer.line) + "\n" for answer in wanted)  # type: ignore[union-attr]


def test_the_flag_decides_how_long_an_answer_is(
    chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rather than the domain, whether it allows fewer tokens or more."""
    model = DomainModel.from_pretrained(chat_base, device="cpu", out=tmp_path)
    save_task(tmp_path / "short", model.base, Generation(max_new_tokens=7), 0)
    model.load_adapter("short")
    found = []
    for flags in (["--max-tokens", "3"], [], ["--max-tokens", "20"]):
        typed(monkeypatch, "the red river")
        where = ("--base", str(chat_base), "--out", str(tmp_path))
        assert run("chat", "short", *where, *flags) == 0
        found.append(capsys.readouterr().out.strip())
    assert [found[1]] == model.predict("the red river", "short")
    assert found[2].startswith(found[1])
    assert found[1].startswith(found[0])
    assert len(set(found)) == 3


def test_a_terminal_shows_errors_and_goes_on(
    chat_base: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    prompts = keyed(monkeypatch, "/help", "/domian second", "/domain nobody", "red " * 600,
                    "/domain second", "red")  # fmt: skip
    where = ("--base", str(chat_base), "--out", str(adapters), "--max-tokens", "4")
    assert run("chat", "first", *where) == 0
    assert prompts == ["first> "] * 5 + ["second> "] * 2
    shown = capsys.readouterr()
    assert all(command in shown.out for command in serving.COMMANDS)
    errors = " ".join(shown.err.split())
    assert "Did you mean '/domain'" in errors
    assert "the name of one in" in errors
    assert "the base's context of 512 tokens" in errors


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_terminal_shows_no_greeting_and_no_stages(
    quiet: bool, chat_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keyed(monkeypatch)
    assert run("chat", "--base", str(chat_base), *["--quiet"] * quiet) == 0
    shown = capsys.readouterr()
    assert ("/help" in shown.out, "memory" in shown.err) == (not quiet, not quiet)


def test_ctrl_c_ends_an_answer_or_the_chat(
    chat_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = iter([None, KeyboardInterrupt()])
    step = Batch.step

    def interrupted(batch: Batch) -> object:
        if (error := next(steps, None)) is not None:
            raise error
        return step(batch)

    monkeypatch.setattr(Batch, "step", interrupted)
    keyed(monkeypatch, "red", "blue", KeyboardInterrupt)
    assert run("chat", "--base", str(chat_base), "--max-tokens", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # the greeting, a part of an answer, an answer, the line of the prompt


def test_errors_of_a_pipe_end_it(
    tiny_base: Path, chat_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    typed(monkeypatch, "hello")
    assert run("chat", "--base", str(tiny_base)) == 2
    assert "a base with a chat template" in capsys.readouterr().err
    typed(monkeypatch, "/nope")
    assert run("chat", "--base", str(chat_base)) == 2
    assert "expected  a command" in capsys.readouterr().err
    for flags in (
        ["--max-tokens", "0"],
        ["--temperature", "3"],
        ["--temperature", "nan"],
    ):
        assert run("chat", "--base", str(tmp_path), *flags) == 2
        assert f"UsageError {flags[0]}" in capsys.readouterr().err


def test_an_encoder_answers_with_labels_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.encoders import make_encoder

    encoder = make_encoder(tmp_path / "bert", "bert")
    typed(monkeypatch, "hello")
    assert run("chat", "--base", str(encoder)) == 2
    assert "a causal language model" in capsys.readouterr().err
    shutil.rmtree(encoder)
