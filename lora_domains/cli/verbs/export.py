"""The verb export: adapters for other programs. torch is imported late."""

import argparse
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lora_domains.adapters.folder import CONFIG, WEIGHTS, find_adapter, fingerprint, replacing
from lora_domains.analysis.reproduce import base_named_by
from lora_domains.atomic import adapter_name
from lora_domains.cli.flags import add_base_flags, add_quiet_flag
from lora_domains.cli.machine import check_bases
from lora_domains.cli.parser import ADAPTERS, Verbs, add_adapter_argument, add_verb
from lora_domains.cli.recipes import open_model
from lora_domains.console import Display
from lora_domains.embedded import BASE_PATH
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterUnsupported,
    BaseModelError,
    UsageError,
    listed,
)
from lora_domains.report.card import CARD, Card
from lora_domains.tasks import task_from_record
from lora_domains.tokenization.turns import PLAIN, chat_options

if TYPE_CHECKING:
    from lora_domains.model import DomainModel

TARGETS = {
    "merged": "a plain transformers model with its tokenizer",
    "gguf": "the same as one GGUF file, for llama.cpp",
    "gguf-adapter": "the adapter alone as a GGUF file, which llama.cpp adds to its base",
    "ollama": "a GGUF file and a Modelfile with the adapter's prompt",
    "vllm": "the adapters as vLLM loads them, and serve.sh, the command",
}
"""What export writes, by target."""
SERVE = "serve.sh"
TEMPLATE = "chat_template.jinja"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank (vllm.config.lora.MaxLoRARanks, 0.33)."""


def add_verbs(verbs: Verbs) -> None:
    targets = ", ".join(f"{name}: {what}" for name, what in TARGETS.items())
    parser = add_verb(
        verbs, "export", export,
        usage="ADAPTER [ADAPTER ...] --out DIR [options]",
        description="Write an adapter for another program into --out. By default it is merged into "
        "its base: a plain transformers model with its tokenizer. --to gguf and --to ollama write "
        "the merged model as a GGUF file, and --to gguf-adapter the adapter alone; they are read "
        "again. The output says how far the logits of "
        "what was written are from those of the adapter. With --to vllm, several adapters of one "
        "base are written as vLLM loads them, with the command that serves them.",
        example="lora-domains export triage --out merged/triage --dtype bfloat16\n"
        "  lora-domains export triage --to ollama --out ollama/triage\n"
        "  lora-domains export triage billing --to vllm --out served",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, "adapters", nargs="+", help="its folder, its name in "
                         f"{ADAPTERS}/, or OWNER/NAME@REVISION on the Hub; several with --to "
                         "vllm")  # fmt: skip
    add_base_flags(inputs, quantised=False)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", required=True, metavar="DIR", help="folder to write (required)")
    add("--to", default="merged", choices=TARGETS, metavar="TARGET", help=f"{targets}; default: "
        "%(default)s")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), metavar="DTYPE",
        help="dtype of merged weights: float32 (default), bfloat16 or float16")  # fmt: skip
    add_quiet_flag(output)


def export(flags: argparse.Namespace) -> int:
    """Write adapters for another program."""
    folders = [find_adapter(name, Path(ADAPTERS)) for name in flags.adapters]
    if flags.to == "vllm":
        if flags.dtype:
            raise UsageError(
                where="--dtype",
                expected="--to merged, whose weights it is for",
                found="--to vllm",
                hint="Leave it out: the adapters stay as they are.",
            )
        check_bases("export --to vllm", folders, out=flags.out)
        for_vllm(folders, Path(flags.out), flags.base, Display(brief=flags.quiet))
        return 0
    if len(folders) > 1:
        raise UsageError(
            where=f"--to {flags.to}",
            expected="one adapter",
            found=listed(folder.name for folder in folders),
            hint="Export each by itself, or several --to vllm.",
        )
    # On the CPU in float32, so that the reported error is that of the saved weights.
    model = open_model(flags, out=ADAPTERS, adapter=folders[0], device="cpu", dtype="float32")
    name, dtype = model.load_adapter(folders[0]), flags.dtype or "float32"
    card = model.bank[name].card
    told = chat_options(card.adapter.chat) if card else {}
    options = ["--chat-template-kwargs", json.dumps(told)] if told else []
    if flags.to == "merged":
        model.export(name, flags.out, dtype=dtype)
        if options:
            model.display.line(f"It was trained with the chat template options {options[1]}.")
        return 0
    from lora_domains.adapters.merging import export_gguf, export_gguf_adapter

    file = Path(flags.out) / f"{name}.gguf"
    if flags.to == "gguf-adapter":
        error = export_gguf_adapter(model.bank, name, Path(flags.out), dtype)
        found = "it has no effect" if error is None else f"error {error:.1e} of its effect"
        model.display.stage("adapter", None, None, f"{name} in {dtype}; {found}")
        command = ["llama-server", "-m", "BASE.gguf", "--lora", str(file), *options]
        model.display.line(f"Saved: {file}\nServe: {shlex.join(command)}")
        return 0
    ollama = flags.to == "ollama"
    merged = export_gguf(
        model.bank, name, Path(flags.out), dtype,
        lambda: {MODELFILE: modelfile(model, name)} if ollama else {},
    )  # fmt: skip
    model.display.stage("merged", None, None, str(merged))
    model.display.line(f"Saved: {file}")
    if ollama:
        made = shlex.join(["ollama", "create", name, "-f", str(Path(flags.out) / MODELFILE)])
        model.display.line(f"Serve: {made}; ollama run {name}")
    elif options:
        command = ["llama-server", "-m", str(file), *options]
        model.display.line(f"Serve: {shlex.join(command)}")
    return 0


# ── Ollama ──────────────────────────────────────────────────────────────────────────────────────

MODELFILE = "Modelfile"
SYSTEM, USER, ANSWER, AGAIN = "it is told this", "it is asked this", "it says this", "then this"


def modelfile(model: "DomainModel", name: str) -> str:
    """How Ollama asks an adapter: with the prompt of its training, and until its answers end.

    Raises UsageError without a card, AdapterUnsupported for a chat template of which no template
    of Ollama is known.
    """
    from lora_domains.inference.predict import length_of, task_of
    from lora_domains.modeling.base_check import answer_ends
    from lora_domains.modeling.batching import template_of, tokenization_of

    base, task = model.base, task_of(model.bank, name)
    tokenizer, length = base.tokenizer, length_of(model.bank, name)
    ends = answer_ends(tokenizer, base.generation_config, base.model.config)
    lines = [f"FROM ./{name}.gguf", "PARAMETER temperature 0", f"PARAMETER num_ctx {base.context}"]
    if task.max_new_tokens:
        lines.append(f"PARAMETER num_predict {task.max_new_tokens}")
    stops = tokenizer.convert_ids_to_tokens(sorted(ends))
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in sorted(stops)]
    if task.converses:
        chat = template_of(base, task)
        template, system = conversation(tokenizer, name, chat.source(), **chat.options)
        lines += [f"SYSTEM {_tripled(system)}"] if system else []
    elif len({*task.input_columns}) > 1:
        lines.append(f"# A prompt has several columns; give all of it: {json.dumps(task.template)}")
        template = "{{ .Prompt }}"
    else:
        tokenization = tokenization_of(base, task, length)
        prompt = tokenization.encode(task.to_predict(USER, 0)).prompt
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        # llama.cpp adds what the tokenizer begins a text with.
        begins = tokenizer.decode(tokenization.bos, skip_special_tokens=False)
        before, _, after = text.removeprefix(begins).partition(USER)
        template = _literal(before) + "{{ .Prompt }}" + _literal(after)
    return "\n".join([*lines, f"TEMPLATE {_tripled(template)}"])


def conversation(
    tokenizer: Any, name: str, source: str | None = None, **options: bool
) -> tuple[str, str]:
    """(the template of Ollama that renders chats as the tokenizer's own, its default system turn).

    ``source`` is another template than the tokenizer's, and ``options`` what it is told. Raises
    AdapterUnsupported where turns are not rendered one after the other.
    """
    from lora_domains.tokenization.tokenization import Tokenization

    roles = ["system", "user", "assistant", "user"]
    # llama.cpp adds it where the tokenizer does; a turn may begin with the same token.
    begins = tokenizer.decode(Tokenization(tokenizer, 1).bos, skip_special_tokens=False)

    def render(texts: Sequence[str], first: int = 0, prompt: bool = False) -> str:
        turns = [{"role": roles[first + n], "content": text} for n, text in enumerate(texts)]
        text = tokenizer.apply_chat_template(
            turns, chat_template=source, tokenize=False, add_generation_prompt=prompt, **options
        )
        return str(text).removeprefix(begins)

    texts = [SYSTEM, USER, ANSWER, AGAIN]
    try:
        before_system, after_system = render(texts[:1]).split(SYSTEM)
        told, asked = render(texts[:1]), render(texts[:2])
        before_user, after_user = asked.removeprefix(told).split(USER)
        before_answer, after_answer = render(texts[:3]).removeprefix(asked).split(ANSWER)
        default = render([USER], 1).removesuffix(before_user + USER + after_user)
        system = default.removeprefix(before_system).removesuffix(after_system)
        whole = render(texts, prompt=True)
    except (ValueError, TypeError, TemplateError) as error:
        raise _untemplated(name, type(error).__name__) from error
    around = [(before_system, after_system), (before_user, after_user),
              (before_answer, after_answer)]  # fmt: skip
    turns = "".join(a + t + b for t, (a, b) in zip(texts, [*around, around[1]], strict=True))
    if not whole.startswith(turns) or default not in ("", before_system + system + after_system):
        raise _untemplated(name, "turns that depend on each other")
    cases = [
        f'{{{{ if eq .Role "{role}" }}}}{_literal(a)}{{{{ .Content }}}}{_literal(b)}{{{{ end }}}}'
        for role, (a, b) in zip(roles, around, strict=False)
    ]
    return (
        f"{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{_literal(whole[len(turns) :])}",
        system,
    )


def _untemplated(name: str, found: str) -> AdapterUnsupported:
    return AdapterUnsupported(
        where=f"{name} for Ollama",
        expected="a chat template that renders one turn after the other",
        found=found,
        hint="Write the GGUF file alone (--to gguf); the adapter's README says how turns are "
        "written.",
    )


def _literal(text: str) -> str:
    """``text`` in a template of Go."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


def _tripled(text: str) -> str:
    """A value of a Modelfile."""
    return f'"""{text}"""'


# ── vLLM ────────────────────────────────────────────────────────────────────────────────────────


def for_vllm(folders: Sequence[Path], out: Path, base: str | None, display: Display) -> None:
    """Write adapters of one base, and the command that serves them with vLLM.

    Raises AdapterUnsupported for one that vLLM cannot serve, AdapterCorrupt for a changed one,
    UsageError for adapters of several bases, or of one name.
    """
    configs = {folder: json.loads((folder / CONFIG).read_text("utf-8")) for folder in folders}
    for folder, config in configs.items():
        _check_unchanged(folder)
        _check_served(folder.name, config)
    bases = {folder: (base, None) if base else base_named_by(folder) for folder in folders}
    names = [adapter_name(folder) for folder in folders]
    for expected, found in (
        ("adapters of one base", [str(one or "embedded") for one, _ in {*bases.values()}]),
        ("adapters of different names", sorted({name for name in names if names.count(name) > 1})),
    ):
        if len(found) > ("base" in expected):
            raise UsageError(
                where="--to vllm", expected=expected, found=listed(found),
                hint="Export them by themselves.",
            )  # fmt: skip
    rank = max(_rank(config) for config in configs.values())
    path, revision = bases[folders[0]]
    command = [
        "vllm", "serve", str(BASE_PATH) if path is None else path,
        *(["--revision", revision] if revision else []),
        "--enable-lora", "--max-loras", str(len(folders)),
        "--max-lora-rank", str(next(most for most in RANKS if most >= rank)),
        "--lora-modules", *(f"{name}=./{name}" for name in names),
    ]  # fmt: skip
    template = _plain_template(folders, path, revision, display)
    command += ["--chat-template", f"./{TEMPLATE}"] if template else []
    told = {json.dumps(options) for folder in folders if (options := _told(folder))}
    if len(told) == 1:
        command += ["--default-chat-template-kwargs", *told]
    with replacing(out, SERVE) as fresh:
        for folder, name in zip(folders, names, strict=True):
            (fresh / name).mkdir()
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(folder / file, fresh / name / file)
        if template:
            (fresh / TEMPLATE).write_text(template, encoding="utf-8")
        prompts = [line for folder in folders for line in _prompt(folder)]
        lines = [
            "#!/bin/sh",
            *prompts,
            'cd "$(dirname "$0")" || exit',
            "exec " + shlex.join(command),
        ]
        (fresh / SERVE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / SERVE).chmod(0o755)
    display.line(f"Saved: {out}\nServe: {shlex.join(['sh', str(out / SERVE)])}")


def _check_unchanged(folder: Path) -> None:
    card = Card.read(folder, measured=False) if (folder / CARD).is_file() else None
    if card is not None and card.adapter.sha256 not in (None, fingerprint(folder)):
        raise AdapterCorrupt(
            where=folder.name,
            expected="the bytes that its card describes",
            found="other bytes",
            hint="Copy the folder again from where the adapter was made.",
        )


def _check_served(name: str, config: Mapping[str, Any]) -> None:
    """Raise AdapterUnsupported for an adapter that vLLM refuses, or answers differently."""
    kind, rank = config.get("task_type"), _rank(config)
    for refused, found in (
        (config.get("peft_type") != "LORA", f"peft_type {config.get('peft_type')!r}"),
        (config.get("modules_to_save") or kind not in (None, "CAUSAL_LM"), "a trained head"),
        (config.get("use_dora"), "DoRA"),
        (rank > RANKS[-1], f"rank {rank}, above {RANKS[-1]}"),
    ):
        if refused:
            raise AdapterUnsupported(
                where=name,
                expected="an adapter that vLLM serves: plain LoRA that generates text",
                found=found,
                hint="Answer with it here: lora-domains predict, or lora-domains serve."
                if found == "a trained head" else "Merge it, and serve that: --to merged",
            )  # fmt: skip


def _rank(config: Mapping[str, Any]) -> int:
    """The highest rank of any module."""
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _prompt(folder: Path) -> list[str]:
    """A comment that says how the adapter is to be asked."""
    if not (folder / CARD).is_file():
        return []
    task = task_from_record(Card.read(folder, measured=False).adapter.task)
    how = "chats" if task.chat else f"completions of {json.dumps(task.template)}"
    told = _told(folder)
    how += f", with the chat template options {json.dumps(told)}" if told else ""
    return [f"# {adapter_name(folder)} was trained on {how}"]


def _told(folder: Path) -> dict[str, bool]:
    """What the chat template was told in the training of an adapter; {} without a card."""
    return chat_options(_chat(folder))


def _plain_template(
    folders: Sequence[Path], path: str | None, revision: str | None, display: Display
) -> str | None:
    """The template of adapters of chats whose base has none: vLLM would refuse to chat.

    Where the base is not here, a warning says that its tokenizer was not asked how a text begins.
    """
    if all(_chat(folder).get("template") != "plain" for folder in folders):
        return None
    from lora_domains.modeling.base_check import load_tokenizer
    from lora_domains.modeling.checkpoint import find_checkpoint
    from lora_domains.tokenization.chat_template import ChatTemplate

    source = str(path or BASE_PATH)
    try:
        checkpoint = find_checkpoint(source, revision, source)
        return ChatTemplate(load_tokenizer(checkpoint, source, bidirectional=False)).plain
    except BaseModelError:
        display.warn(
            f"{source} is not here, so {TEMPLATE} begins with no token: if its tokenizer begins a "
            "text with one, write {{ bos_token }} before the rest"
        )
        return PLAIN


def _chat(folder: Path) -> Mapping[str, str]:
    """The entry ``chat`` of an adapter's card; {} without a card."""
    if not (folder / CARD).is_file():
        return {}
    return Card.read(folder, measured=False).adapter.chat
