"""Strict loading: a named error, and an unchanged bank."""

import ast
import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file
from support.adapters import save, strong
from support.damaged import CARD, CONFIG, SECONDS, WEIGHTS, edit, plainly, refused
from support.structure import PACKAGE, imported, parsed

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base

Damage = Callable[[Path], None]


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


@pytest.mark.contract
def test_an_undamaged_adapter_loads(bank: Bank, folder: Path) -> None:
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


@pytest.mark.contract
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


def test_a_card_detects_every_changed_byte(bank: Bank, folder: Path) -> None:
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
def test_a_truncated_file_is_refused(bank: Bank, folder: Path, kept: int) -> None:
    for card in (True, False):
        path = (folder if card else plainly(folder)) / WEIGHTS
        path.write_bytes(path.read_bytes()[:kept])
        refused(
            bank, folder, AdapterCorrupt, "sha256" if card else "[Hh]eader|[Ii]ncomplete|buffer"
        )


# ── Files ───────────────────────────────────────────────────────────────────────────────────────


class Trap:
    """A pickle that creates a file when it is read."""

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


def test_missing_files_are_named(bank: Bank, folder: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        error = refused(bank, folder, AdapterCorrupt, "README.md")
        assert name in error.expected
    shutil.rmtree(folder)
    refused(bank, folder, AdapterError, "no such folder")
    folder.write_text("")
    refused(bank, folder, AdapterError, "a file")


# ── Cards ───────────────────────────────────────────────────────────────────────────────────────


def _card(**changes: Any) -> Damage:
    return lambda folder: edit(folder, CARD, **changes)


def _task(**task: Any) -> Damage:
    """Another task in the card's settings."""

    def damage(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        card["adapters"][0]["settings"] = {"task": task}
        (folder / CARD).write_text(json.dumps(card))

    return damage


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
        (_task(kind="telepathy"), AdapterUnsupported, "telepathy"),
        (
            _task(kind="classification", positive="a", target_recall="x"),
            AdapterUnsupported,
            "TypeError",
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


def test_another_precision_loads_with_a_note(bank: Bank, folder: Path, tiny_base: Path) -> None:
    half: Base = load_base(tiny_base, dtype="bfloat16")
    (note,) = load_adapter(folder, half).notes
    assert "float32" in note
    assert "not measured at this precision" in note


def test_copies_of_the_embeddings_are_no_extra_tensors(bank: Bank, folder: Path) -> None:
    """PEFT saves them when it cannot see whether the vocabulary was resized."""
    from safetensors.torch import load_file, save_file

    wanted = load_adapter(folder, bank.base).weights
    path = plainly(folder) / "adapter_model.safetensors"
    weight = bank.base.model.get_input_embeddings().weight.detach().clone()
    copies = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    tensors = load_file(path) | {f"base_model.model.{key}": copy for key, copy in copies.items()}
    save_file(tensors, path)
    weights = load_adapter(folder, bank.base).weights
    assert all(torch.equal(weights[key][1], wanted[key][1]) for key in wanted)
    weight[3, 4] += 1e-3
    save_file(tensors, path)
    refused(bank, folder, AdapterCorrupt, r"1 unexpected, such as .*embed_tokens\.weight")


def test_loading_imports_no_report_view() -> None:
    """Neither modeling nor adapters import more of the report than the card, but for the README."""
    for room in ("modeling", "adapters"):
        for path in (PACKAGE / room).glob("*.py"):
            modules = imported(parsed(path))
            if path.name == "readme.py":
                continue
            assert "lora_domains.adapters.readme" not in modules, path.name
            of_report = {name for name in modules if name.startswith("lora_domains.report")}
            assert of_report <= {"lora_domains.report.card"}, path.name
    # What shows a card in a notebook imports its view when it is called.
    body = parsed(PACKAGE / "report" / "card.py").body
    card = {name for part in body if not isinstance(part, ast.ClassDef) for name in imported(part)}
    assert "lora_domains.tasks" in card
    assert not {name for name in card if name.startswith("lora_domains.report")}
