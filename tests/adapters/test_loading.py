"""Loading is strict and whole (contract 3): a named error, and the bank as it was before."""

import json
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from support.adapters import logits, save, strong

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base

SECONDS = 2.0
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "card.json"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    """A bank with "a" and "strong" resident; the adapters to refuse are called "strong" too."""
    base = load_base(tiny_base)
    bank = Bank(base)
    bank.add(strong(base, "a", seed=8))
    bank.add(strong(base, "strong", seed=9))
    return bank


@pytest.fixture(scope="module")
def saved(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "strong", strong(bank.base), bank.base)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """An adapter folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "strong"))


def refused(bank: Bank, folder: Path, kind: type[AdapterError], found: str) -> AdapterError:
    """The error of loading ``folder``; quick, and the bank is as it was."""
    before = {name: logits(bank, name) for name in (None, *bank)}
    started = time.perf_counter()
    with pytest.raises(AdapterError, match=f"(?s)found .*{found}") as caught:
        bank.add(load_adapter(folder, bank.base))
    assert time.perf_counter() - started < SECONDS
    assert type(caught.value) is kind
    assert caught.value.expected
    assert caught.value.hint
    assert caught.value.where
    assert [None, *bank] == list(before)
    for name, wanted in before.items():
        assert torch.equal(logits(bank, name), wanted)
    return caught.value


def plainly(folder: Path) -> Path:
    """``folder`` without its card, as plain PEFT saves it: no digest guards it."""
    (folder / CARD).unlink(missing_ok=True)
    return folder


def edit(folder: Path, name: str = CONFIG, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def test_what_is_not_damaged_loads(bank: Bank, folder: Path) -> None:
    started = time.perf_counter()
    assert load_adapter(folder, bank.base).notes == ()
    assert len(load_adapter(plainly(folder), bank.base).notes) == 1
    assert time.perf_counter() - started < 2 * SECONDS


# ── Another base ────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_of_another_base_is_refused(bank: Bank, tmp_path: Path) -> None:
    other = load_base(make_base(tmp_path / "other", seed=1))
    folder = save(tmp_path / "strong", strong(other), other)
    error = refused(bank, folder, AdapterMismatch, "one made on other")
    assert "--base other" in error.hint


def test_an_adapter_of_plain_peft_for_another_shape_is_refused(bank: Bank, tmp_path: Path) -> None:
    for name, changes in (("deeper", {"num_hidden_layers": 3}), ("wider", {"hidden_size": 64})):
        other = load_base(make_base(tmp_path / name, **changes))
        folder = plainly(save(tmp_path / name / "strong", strong(other), other))
        refused(bank, folder, AdapterCorrupt, r"\d+ (of other shapes|unexpected)")


# ── Tensors ─────────────────────────────────────────────────────────────────────────────────────


def _half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[::2])


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("base_model.model.", ""): value for key, value in tensors.items()}


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(400, 32)


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].T.contiguous()


def _poisoned(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = list(tensors)[-1]
        tensors[key] = tensors[key].clone()
        tensors[key][-1, -1] = value
        tensors[key] = tensors[key].to(dtype)

    return change


def _whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_half, "14 missing, such as"),
        (_renamed, "28 missing"),
        (lambda tensors: {"one": torch.zeros(1)}, "28 missing"),
        (_extra, r"1 unexpected, such as .*embed_tokens"),
        (_transposed, r"1 of other shapes, such as .* with \("),
        (_poisoned(float("nan")), "NaN or infinity in"),
        (_poisoned(float("inf")), "NaN or infinity in"),
        (_poisoned(float("nan"), torch.bfloat16), "NaN or infinity in"),
        (_poisoned(float("nan"), torch.float8_e4m3fn), "F8_E4M3"),
        (_whole_numbers, "I(64|32|8)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    bank: Bank, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], found: str
) -> None:
    retensor(plainly(folder), change)
    refused(bank, folder, AdapterCorrupt, found)


def test_a_card_guards_every_byte(bank: Bank, folder: Path) -> None:
    for name, position in ((WEIGHTS, -1), (WEIGHTS, 4000), (CONFIG, -1)):
        kept = (folder / name).read_bytes()
        changed = bytearray(kept)
        changed[position] ^= 0x40 if name == WEIGHTS else ord("}") ^ ord(" ")
        if name == CONFIG:
            changed += b"}"
        (folder / name).write_bytes(changed)
        refused(bank, folder, AdapterCorrupt, "a byte of .* was changed")
        (folder / name).write_bytes(kept)
    edit(folder, lora_alpha=9)
    refused(bank, folder, AdapterCorrupt, "a byte of .* was changed")


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -4000])
def test_a_file_that_was_cut_off_is_refused(bank: Bank, folder: Path, kept: int) -> None:
    for card in (True, False):
        path = (folder if card else plainly(folder)) / WEIGHTS
        path.write_bytes(path.read_bytes()[:kept])
        refused(
            bank, folder, AdapterCorrupt, "sha256" if card else "[Hh]eader|[Ii]ncomplete|buffer"
        )


# ── Files ───────────────────────────────────────────────────────────────────────────────────────


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_read(bank: Bank, folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    refused(bank, folder, AdapterUnsupported, "adapter_model.bin, a pickle")
    assert not sprung.exists()


def test_files_that_are_missing_are_named(bank: Bank, folder: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        error = refused(bank, folder, AdapterCorrupt, "README.md")
        assert name in error.expected
    shutil.rmtree(folder)
    refused(bank, folder, AdapterError, "no such folder")
    folder.write_text("")
    refused(bank, folder, AdapterError, "a file")


# ── Configs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "list"),
        ("null", "NoneType"),
        ("\udcff", "UnicodeDecodeError"),
        ('{"r":' + "[" * 100_000, "RecursionError"),
    ],
    ids=["empty", "open", "list", "null", "bytes", "deep"],
)
def test_a_config_that_is_no_json_object_is_refused(
    bank: Bank, folder: Path, text: str, found: str
) -> None:
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    refused(bank, folder, AdapterCorrupt, found)


SLOW = r"(.*)*x!"
"""Exponential in ``re``, at once in engines that look for the ``!`` first."""


@pytest.mark.parametrize(
    ("changes", "kind", "found"),
    [
        # Numbers
        ({"r": 20000}, AdapterCorrupt, "28 of other shapes"),
        ({"r": 10**30}, AdapterCorrupt, "1000000"),
        ({"r": -1}, AdapterCorrupt, "-1"),
        ({"r": 0}, AdapterCorrupt, "0"),
        ({"r": "x"}, AdapterCorrupt, "x"),
        ({"r": [4]}, AdapterCorrupt, r"\[4\]"),
        ({"r": True}, AdapterCorrupt, "True"),
        ({"r": None}, AdapterCorrupt, "None"),
        ({"lora_alpha": [8]}, AdapterCorrupt, r"\[8\]"),
        ({"lora_alpha": float("nan")}, AdapterCorrupt, "nan"),
        ({"lora_alpha": float("inf")}, AdapterCorrupt, "inf"),
        ({"lora_dropout": 1.5}, AdapterCorrupt, "1.5"),
        ({"lora_dropout": "0.1"}, AdapterCorrupt, "0.1"),
        ({"use_rslora": "no"}, AdapterCorrupt, "no"),
        ({"rank_pattern": {"q_proj": 2.5}}, AdapterCorrupt, "2.5"),
        ({"rank_pattern": {"q_proj": 10**30}}, AdapterCorrupt, "1000000"),
        ({"rank_pattern": ["q_proj"]}, AdapterCorrupt, "q_proj"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, AdapterCorrupt, "inf"),
        ({"alpha_pattern": {"q_proj": "8"}}, AdapterCorrupt, "8"),
        ({"layers_to_transform": "all"}, AdapterCorrupt, "all"),
        ({"layers_to_transform": [0.5]}, AdapterCorrupt, "0.5"),
        ({"layers_pattern": 3}, AdapterCorrupt, "3"),
        # Targets
        ({"target_modules": []}, AdapterCorrupt, r"\[\]"),
        ({"target_modules": 7}, AdapterCorrupt, "7"),
        ({"target_modules": [["q_proj"]]}, AdapterCorrupt, "q_proj"),
        ({"target_modules": ["nothing"]}, AdapterUnsupported, "'nothing'"),
        ({"target_modules": ["embed_tokens"]}, AdapterUnsupported, "kind Embedding"),
        ({"target_modules": "a" * 5000}, AdapterCorrupt, "aaaa"),
        ({"target_modules": "(q_proj"}, AdapterUnsupported, "one that is invalid"),
        ({"target_modules": "q", "layers_to_transform": [0]}, AdapterCorrupt, "cannot be used"),
        ({"layers_pattern": "layers"}, AdapterCorrupt, "must also be specified"),
        # Patterns that hang
        ({"target_modules": SLOW}, AdapterUnsupported, "takes too long"),
        ({"exclude_modules": SLOW}, AdapterUnsupported, "takes too long"),
        ({"rank_pattern": {SLOW: 4}}, AdapterUnsupported, "takes too long"),
        ({"alpha_pattern": {SLOW: 4}}, AdapterUnsupported, "takes too long"),
        (
            {"layers_pattern": [SLOW], "layers_to_transform": [0]},
            AdapterUnsupported,
            "takes too long",
        ),
        # Methods and options that are not plain LoRA
        ({"peft_type": "LOHA"}, AdapterUnsupported, "'LOHA'"),
        ({"peft_type": None}, AdapterUnsupported, "None"),
        ({"task_type": "SEQ_CLS"}, AdapterCorrupt, "none"),
        ({"task_type": "TOKEN_CLS"}, AdapterUnsupported, "TOKEN_CLS"),
        ({"task_type": "NONSENSE"}, AdapterUnsupported, "NONSENSE"),
        ({"bias": "all"}, AdapterUnsupported, "bias='all'"),
        ({"bias": "lora_only"}, AdapterUnsupported, "bias='lora_only'"),
        ({"use_dora": True}, AdapterUnsupported, "use_dora='True'"),
        ({"lora_bias": True}, AdapterUnsupported, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, AdapterUnsupported, "modules_to_save"),
        ({"trainable_token_indices": [1]}, AdapterUnsupported, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, AdapterUnsupported, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, AdapterUnsupported, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, AdapterUnsupported, "alora_invocation_tokens"),
        ({"use_qalora": True}, AdapterUnsupported, "use_qalora"),
        ({"megatron_config": {"a": 1}}, AdapterUnsupported, "megatron_config"),
        ({"corda_config": {"a": 1}}, AdapterUnsupported, "corda_config"),
        ({"an_option_of_tomorrow": True}, AdapterUnsupported, "an_option_of_tomorrow='True'"),
        ({"an_option_of_tomorrow": {"a": 1}}, AdapterUnsupported, "an_option_of_tomorrow"),
        *(
            ({"init_lora_weights": init}, AdapterUnsupported, f"init_lora_weights='{init}'")
            for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica")
        ),
        ({"init_lora_weights": {"a": 1}}, AdapterUnsupported, "init_lora_weights"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_would_be_served_wrongly_is_refused(
    bank: Bank, folder: Path, changes: dict[str, Any], kind: type[AdapterError], found: str
) -> None:
    edit(plainly(folder), **changes)
    refused(bank, folder, kind, found)


def test_a_huge_rank_allocates_nothing(bank: Bank, folder: Path) -> None:
    edit(plainly(folder), r=65536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(bank, folder, AdapterCorrupt, "28 of other shapes")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 65536 * 32 * 4 * 4, "four of the 28 tensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_version": "99.0"},
        {"revision": "main"},
        {"inference_mode": False},
        {"an_option_of_tomorrow": None},
        {"an_option_of_tomorrow": False},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
        {"rank_pattern": None, "alpha_pattern": None},
        {"layers_pattern": []},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
    ],
    ids=str,
)
def test_options_that_change_nothing_are_taken(
    bank: Bank, folder: Path, changes: dict[str, Any]
) -> None:
    wanted = load_adapter(folder, bank.base).weights
    edit(plainly(folder), **changes)
    weights = load_adapter(folder, bank.base).weights
    assert all(torch.equal(weights[k][1], wanted[k][1]) for k in wanted)


def test_a_config_imports_nothing(
    bank: Bank, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    edit(plainly(folder), auto_mapping=mapping, megatron_core="evil", task_type=None)
    load_adapter(folder, bank.base)
    edit(folder, megatron_config={"tensor_model_parallel_size": 2})
    refused(bank, folder, AdapterUnsupported, "megatron_config")


# ── Cards ───────────────────────────────────────────────────────────────────────────────────────


def _card(**changes: Any) -> Damage:
    return lambda folder: edit(folder, CARD, **changes)


def _text(text: str) -> Damage:
    return lambda folder: (folder / CARD).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "kind", "found"),
    [
        (_text(""), AdapterCorrupt, "no JSON"),
        (_text("[1]"), AdapterCorrupt, "list"),
        (_text("{}"), AdapterCorrupt, "schema None"),
        (_text("[" * 100_000), AdapterCorrupt, "no JSON"),
        (_card(base=None), AdapterCorrupt, "NoneType"),
        (_card(base={"id": "x"}), AdapterCorrupt, "no 'identity'"),
        (_card(adapters=[]), AdapterCorrupt, "list"),
        (_card(adapters=[{}, {}]), AdapterCorrupt, "list"),
        (_card(schema=2), AdapterCorrupt, "schema 2"),
        (_card(schema=None), AdapterCorrupt, "schema None"),
        (_card(adapters=[{"domain": "a", "sha256": 5}]), AdapterCorrupt, "int '5'"),
        (_card(adapters=[{"domain": "a", "sha256": "0" * 64}]), AdapterCorrupt, "a byte of"),
        (
            _card(base={"id": 1, "identity": [], "dtype": {}, "quantization": {}}),
            AdapterCorrupt,
            "int '1'",
        ),
    ],
)
def test_a_damaged_card_is_refused(
    bank: Bank, folder: Path, damage: Damage, kind: type[AdapterError], found: str
) -> None:
    damage(folder)
    refused(bank, folder, kind, found)


def test_a_card_without_a_schema_is_refused(bank: Bank, folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    del card["schema"]
    (folder / CARD).write_text(json.dumps(card))
    refused(bank, folder, AdapterCorrupt, "schema None")


def test_another_precision_is_taken_and_said(bank: Bank, folder: Path, tiny_base: Path) -> None:
    half: Base = load_base(tiny_base, dtype="bfloat16")
    (note,) = load_adapter(folder, half).notes
    assert "float32" in note
    assert "not measured at this precision" in note
