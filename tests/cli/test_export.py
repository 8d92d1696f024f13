"""Adapters for other programs: what export writes is what they load, and it has the same logits."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_rows
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from support.adapters import assert_equal, save, strong, token_ids
from support.commands import run
from support.models import Fitted
from support.peft_folders import peft_logits, peft_saved
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_domains.adapters import merging
from lora_domains.adapters.merging import export_gguf, export_gguf_adapter
from lora_domains.cli.verbs.export import RANKS, SERVE, conversation, modelfile
from lora_domains.console import Display
from lora_domains.errors import AdapterUnsupported, LoraDomainsError
from lora_domains.model import DomainModel
from lora_domains.tokenization.gguf_vocabulary import add_tokenizer

gguf = pytest.importorskip("gguf")

VLLM = os.environ.get("VLLM_SOURCE")
"""A folder with vLLM's package, which need not be installed; by default, the installed one."""
OTHERS = {
    "a trained head": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    "DoRA": {"use_dora": True},
    "rank 513": {"r": 513},
    "another rank": {"rank_pattern": {"q_proj": 700}},
}
"""Settings of adapters that are not served."""


@pytest.fixture
def folder(fitted: Fitted, tmp_path: Path) -> Path:
    """A folder of one adapter that was trained here."""
    shutil.copytree(fitted[0].out / "spam", tmp_path / "adapters" / "spam")
    return tmp_path / "adapters" / "spam"


def changed(folder: Path, **settings: Any) -> Path:
    """A copy of an adapter, without its card, with other settings."""
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    (other / "card.json").unlink()
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | settings))
    return other


def command(out: Path) -> list[str]:
    """The command of a folder for vLLM, which a shell can read."""
    subprocess.run(["sh", "-n", str(out / SERVE)], check=True)
    (line,) = [x for x in (out / SERVE).read_text().splitlines() if x.startswith("exec ")]
    return shlex.split(line)[1:]


def test_adapters_are_written_as_vllm_loads_them(
    folder: Path, fitted: Fitted, tiny_base: Path, tmp_path: Path
) -> None:
    second, expected = peft_saved(tiny_base, tmp_path / "wide", r=20, rank_pattern={"v_proj": 40})
    out = tmp_path / "out"
    flags = ("--base", str(tiny_base), "--to", "vllm", "--out", str(out))
    for _ in range(2):  # what is there is replaced
        assert run("export", str(folder), str(second), *flags) == 0
    assert command(out) == [
        "vllm", "serve", str(tiny_base), "--enable-lora", "--max-loras", "2", "--max-lora-rank",
        "64", "--lora-modules", "spam=./spam", "wide=./wide",
    ]  # fmt: skip
    assert os.access(out / SERVE, os.X_OK)
    assert (
        '# spam was trained on completions of "text: {text}\\nlabel:"' in (out / SERVE).read_text()
    )
    model: DomainModel = fitted[0]
    bare, own = (
        model(input_ids=token_ids()).logits,
        model(input_ids=token_ids(), domain="spam").logits,
    )
    assert_equal(peft_logits(tiny_base, out / "wide"), expected, bare)
    assert_equal(peft_logits(tiny_base, out / "spam"), own, bare)


@pytest.mark.parametrize(("found", "settings"), OTHERS.items(), ids=OTHERS)
def test_an_adapter_that_vllm_does_not_serve_is_refused_by_name(
    folder: Path, tmp_path: Path, found: str, settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = changed(folder, **settings)
    assert run("export", str(other), "--to", "vllm", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "AdapterUnsupported other" in error
    assert found.replace("another rank", "rank 700, above 512") in error
    assert not (tmp_path / "out").exists()


def test_other_uses_of_the_target_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    shutil.copytree(folder, tmp_path / "b" / "spam")
    second = str(tmp_path / "b" / "spam")
    for flags, part in (
        (("--to", "vllm", "--out", str(tmp_path / "mine")), "notes"),
        (("--to", "vllm", "--dtype", "float16", "--out", str(tmp_path / "o")), "--dtype"),
        ((second, "--to", "vllm", "--base", "b", "--out", str(tmp_path / "o")), "different names"),
        ((second, "--out", str(tmp_path / "o")), "one adapter"),
    ):
        assert run("export", str(folder), *flags, *([] if "--base" in flags else
                   ["--base", "b"])) == 2  # fmt: skip
        assert part in capsys.readouterr().err
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    assert run("export", str(folder), "--to", "vllm", "--out", str(tmp_path / "o")) == 2
    assert "AdapterCorrupt spam" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# ── GGUF and Ollama ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    """A strong adapter on the embedded base, whose tokenizer has a form in GGUF."""
    made = DomainModel.from_pretrained(display=Display(quiet=True), device="cpu")
    made.load_adapter(save(tmp_path_factory.mktemp("a") / "strong", strong(made.base), made.base))
    return made


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(t, marks=pytest.mark.long) for t in ("bfloat16", "float16"))],
)
def test_a_gguf_file_has_the_logits_of_the_adapter(
    model: DomainModel, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    merged = export_gguf(model.bank, "strong", out, dtype, lambda: {"more": "text"})
    assert sorted(path.name for path in out.iterdir()) == ["merged.json", "more", "strong.gguf"]
    read = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="strong.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found, expected, bare = (
            read(input_ids=token_ids()).logits,
            model(input_ids=token_ids(), domain="strong").logits,
            model(input_ids=token_ids()).logits,
        )
    error = float((found - expected).norm() / (expected - bare).norm())
    assert error < {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert json.loads((out / "merged.json").read_text())["error"] == merged.record["error"] < 2e-2
    fields = gguf.GGUFReader(out / "strong.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == model.tokenizer.convert_ids_to_tokens(range(len(tokens)))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_gguf_knows_special_tokens_and_those_of_a_user(model: DomainModel, tmp_path: Path) -> None:
    tokenizer = deepcopy(model.tokenizer)
    known = len(tokenizer)
    tokenizer.add_tokens("[mine]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[turn]"]})
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", "llama")
    assert add_tokenizer(writer, tokenizer, known + 3, 128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = gguf.GGUFReader(tmp_path / "tokens.gguf").fields["tokenizer.ggml.token_type"].contents()
    special = {*model.tokenizer.all_special_ids}
    kind = gguf.TokenType
    assert found[:known] == [kind.CONTROL if n in special else kind.NORMAL for n in range(known)]
    assert found[known:] == [kind.USER_DEFINED, kind.CONTROL, kind.UNUSED]


def test_an_adapter_alone_in_gguf_has_its_weights_and_logits(
    model: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp adds alpha / rank · B·A to the tensors of the base, which is done here by hand."""
    from transformers import AutoModelForCausalLM

    adapter = model.bank["strong"]
    # One linear with a factor of its own, as ranks and alphas by pattern give it.
    linear = next(name for name in adapter.scales if name.endswith("k_proj"))
    own = {**adapter.scales, linear: 2.5 * adapter.scales[linear]}
    model.bank.add(replace(adapter, name="other", scales=own))
    out = tmp_path / "out"
    error = export_gguf_adapter(model.bank, "other", out, "float32")
    assert error is not None
    assert error < 1e-5
    assert sorted(path.name for path in out.iterdir()) == ["merged.json", "other.gguf"]
    reader = gguf.GGUFReader(out / "other.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    parts = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    a, b = model.bank.weights("other")[next(n for n in own if n.endswith("0.mlp.up_proj"))]
    assert torch.equal(parts["blk.0.ffn_up.weight.lora_a"], a)
    assert torch.equal(parts["blk.0.ffn_up.weight.lora_b"], b)
    # The tensors of the base are those of a merge that adds nothing.
    model.bank.add(replace(adapter, name="none", scales=dict.fromkeys(own, 0.0)))
    add = gguf.GGUFWriter.add_tensor

    def with_adapter(writer: Any, name: str, array: Any, **options: Any) -> None:
        if (a := parts.pop(f"{name}.lora_a", None)) is not None:
            b = parts.pop(f"{name}.lora_b")
            array = array + (fields["adapter.lora.alpha"] / len(a) * (b @ a)).numpy()
        add(writer, name, array, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", with_adapter)
    monkeypatch.setattr(merging, "EQUAL", torch.inf)
    export_gguf(model.bank, "none", tmp_path / "none", "float32", dict)
    assert not parts
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "none", gguf_file="none.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = read(input_ids=token_ids()).logits
    bare, expected = (
        model(input_ids=token_ids()).logits,
        model(input_ids=token_ids(), domain="other").logits,
    )
    assert float((found - expected).norm() / (expected - bare).norm()) < 1e-5


@pytest.mark.parametrize(("found", "change"), {
    "DoRA": {"magnitudes": {"x": torch.ones(1)}},
    "tied": {"weights": {"lm_head": (torch.ones(1, 1), torch.ones(1, 1))}},
    "one of unknown": {"weights": {"unknown": (torch.ones(1, 1), torch.ones(1, 1))}},
}.items())  # fmt: skip
def test_what_llama_cpp_cannot_add_to_a_base_is_refused(
    model: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str,
    change: dict[str, Any],
) -> None:  # fmt: skip
    changed = replace(model.bank["strong"], **change)
    monkeypatch.setattr(type(model.bank), "__getitem__", lambda *_: changed)
    with pytest.raises(AdapterUnsupported, match=found):
        export_gguf_adapter(model.bank, "strong", tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_what_is_read_again_differently_is_not_kept(
    model: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda value, form: quantize(value * 1.01, form))
    with pytest.raises(AdapterUnsupported, match="logits that differ"):
        export_gguf(model.bank, "strong", tmp_path / "out", "float32", dict)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("spoil", "found"), [
    ("kind", "the kind llama"), ("tokenizer", "another tokenizer"),
    ("package", r"pip install 'lora-domains\[gguf\]'"),
])  # fmt: skip
def test_what_has_no_form_in_gguf_is_refused(
    model: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, found: str
) -> None:
    if spoil == "kind":
        monkeypatch.setattr(merging, "KINDS", {"qwen2": "qwen2"})
    elif spoil == "tokenizer":
        unigram = json.dumps({"model": {"type": "Unigram"}, "added_tokens": []})
        backend = SimpleNamespace(to_str=lambda: unigram)
        merge = merging.merge
        monkeypatch.setattr(merging, "merge", lambda *a: replace(
            merge(*a), tokenizer=SimpleNamespace(backend_tokenizer=backend)
        ))  # fmt: skip
    else:
        monkeypatch.setattr("lora_domains.errors.find_spec", lambda _: None)
    with pytest.raises(LoraDomainsError, match=found):
        export_gguf(model.bank, "strong", tmp_path / "out", "float32", dict)
    assert not (tmp_path / "out").exists()


def rendered(template: str, **values: Any) -> str:
    """What the templates of a Modelfile give, of those parts of Go that they use."""
    python = re.sub(r"{{ range \.Messages }}", "{% for m in Messages %}", template)
    python = re.sub(r'{{ if eq \.Role ("\w+") }}', r"{% if m.role == \1 %}", python)
    ends = iter(["{% endif %}"] * python.count("{% if") + ["{% endfor %}"])
    python = re.sub(r"{{ end }}", lambda _: next(ends), python)
    python = python.replace("{{ .Content }}", "{{ m.content }}").replace(".Prompt", "Prompt")
    return Environment().from_string(python).render(**values)


def test_a_modelfile_asks_as_in_training(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    made = DomainModel.from_pretrained(tiny_base, display=Display(quiet=True))
    lines = modelfile(made, made.load_adapter(folder)).split("\n", 3)
    assert lines[:2] == ["FROM ./spam.gguf", "PARAMETER temperature 0"]
    template = lines[3].partition('TEMPLATE """')[2].removesuffix('"""')
    assert rendered(template, Prompt="red") == "text: red\nlabel:"
    assert "PARAMETER stop" in lines[3]


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST = CHATML.replace("{{ m.content }}", "{% if loop.last %}now: {% endif %}{{ m.content }}")


def test_a_modelfile_renders_chats_as_the_template_does(model: DomainModel) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(model.tokenizer)
    tokenizer.chat_template = CHATML
    template, system = conversation(tokenizer, "strong")
    assert system == "Be kind."
    for turns in (["system", "user"], ["system", "user", "assistant", "user"] * 2):
        messages = [{"role": role, "content": f'{n} "x"\n'} for n, role in enumerate(turns)]
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert rendered(template, Messages=messages) == expected
    # A tokenizer that adds no BOS may have one with which turns begin, as SmolLM2's.
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    assert conversation(tokenizer, "strong") == (template, system)
    tokenizer.chat_template = LAST
    with pytest.raises(AdapterUnsupported, match="depend on each other"):
        conversation(tokenizer, "strong")


@pytest.mark.slow
def test_a_chat_on_a_base_without_a_template_is_exported_with_the_plain_one(
    tiny_base: Path, tmp_path: Path, small_suite: None
) -> None:
    turns = [{"role": role, "content": f"{role} red"} for role in ("system", "user", "assistant")]
    turns += [{"role": "user", "content": "blue"}]
    chats = [{"messages": [{"role": "user", "content": row["text"]},
                           {"role": "assistant", "content": row["label"]}]}
             for row in make_rows(40)]  # fmt: skip
    rows, base = tmp_path / "chats.jsonl", ("--base", str(tiny_base))
    rows.write_text("\n".join(map(json.dumps, chats)))
    fast = ("--max-steps", "1", "--retention", "none", "--out", str(tmp_path))
    assert run("fit", str(rows), "--no-evaluate", *fast, *base) == 0
    model = DomainModel.from_pretrained(tiny_base, display=Display(quiet=True))
    expected = "<s>System: system red\nUser: user red\nAssistant: assistant red</s>\nUser: blue\n"
    expected += "Assistant:"

    def export(to: str) -> Path:
        at = tmp_path / to
        assert run("export", str(tmp_path / "chats"), "--to", to, "--out", str(at), *base) == 0
        return at

    said = {"tokenize": False, "add_generation_prompt": True}
    merged = AutoTokenizer.from_pretrained(export("merged"))
    assert merged.apply_chat_template(turns, **said) == expected
    assert model.tokenizer.chat_template is None
    at = export("vllm")
    assert command(at)[-2:] == ["--chat-template", "./chat_template.jinja"]
    template = (at / "chat_template.jinja").read_text()
    assert model.tokenizer.apply_chat_template(turns, chat_template=template, **said) == expected
    away = ("--to", "vllm", "--base", "/srv/elsewhere", "--out", str(at))
    assert run("export", str(tmp_path / "chats"), *away) == 0
    assert template == "{{ bos_token }}" + (at / "chat_template.jinja").read_text()
    text = (export("ollama") / "Modelfile").read_text()
    template = text.partition('TEMPLATE """')[2].rstrip().removesuffix('"""')
    assert rendered(template, Messages=turns) == expected.removeprefix("<s>")


# ── Against vLLM ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of vLLM's package; what its check of an adapter's config imports is replaced."""
    spec = None if VLLM else importlib.util.find_spec("vllm")
    if VLLM is None and spec is None:
        pytest.skip("vLLM is not here: VLLM_SOURCE names the folder of its package")
    logger = SimpleNamespace(info_once=print)
    parts: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.config": {}, "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": lambda _: logger},
    }  # fmt: skip
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return Path(VLLM) if VLLM else Path(str(spec and spec.origin)).parent


def refused_by_vllm(vllm: Path, folder: Path, most: int) -> str:
    """What vLLM says against an adapter; "" if nothing."""
    spec = importlib.util.spec_from_file_location("peft_helper", vllm / "lora" / "peft_helper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        helper = module.PEFTHelper.from_local_dir(str(folder), None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=most))
    except ValueError as error:
        return str(error)
    return ""


def test_vllm_takes_what_is_written_and_refuses_what_is_refused(
    vllm: Path, folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    second, _ = peft_saved(tiny_base, tmp_path / "wide", r=20, use_rslora=True)
    out = tmp_path / "out"
    assert run("export", str(folder), str(second), "--base", str(tiny_base), "--to", "vllm",
               "--out", str(out)) == 0  # fmt: skip
    most = int(command(out)[command(out).index("--max-lora-rank") + 1])
    assert [refused_by_vllm(vllm, out / name, most) for name in ("spam", "wide")] == ["", ""]
    for name, settings in OTHERS.items():
        other = changed(folder, **settings)
        # vLLM takes heads of classifiers, but the command serves a model that generates text.
        assert bool(refused_by_vllm(vllm, other, RANKS[-1])) == (name != "a trained head")
        shutil.rmtree(other)


def test_the_ranks_are_those_of_vllm(vllm: Path) -> None:
    text = (vllm / "config" / "lora.py").read_text()
    (ranks,) = re.findall(r"MaxLoRARanks = Literal\[(.*?)\]", text)
    assert tuple(map(int, ranks.split(","))) == RANKS
