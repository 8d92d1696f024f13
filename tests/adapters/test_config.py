"""Configs: options beyond plain LoRA, values of other types and slow patterns are refused."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damaged import CONFIG, edit, plainly, refused

from lora_domains.adapters import config
from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterUnsupported,
)
from lora_domains.modeling.bank import Bank


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
def test_a_config_that_is_not_a_json_object_is_refused(
    bank: Bank, folder: Path, text: str, found: str
) -> None:
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    refused(bank, folder, AdapterCorrupt, found)


SLOW = r"(.*)*x!"
"""Exponential in ``re``, instant in engines that look for the ``!`` first."""


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
        ({"use_dora": "yes"}, AdapterCorrupt, "yes"),
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
def test_a_config_beyond_plain_lora_is_refused(
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
def test_options_without_effect_are_accepted(
    bank: Bank, folder: Path, changes: dict[str, Any]
) -> None:
    wanted = load_adapter(folder, bank.base).weights
    edit(plainly(folder), **changes)
    weights = load_adapter(folder, bank.base).weights
    assert all(torch.equal(weights[k][1], wanted[k][1]) for k in wanted)


def test_patterns_are_limited_in_cpu_time_alone(
    bank: Bank, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with other work is slow, and so are the many patterns of a deep adapter."""
    waiting = f"import time; time.sleep({1.5 * config.PATTERN_SECONDS})\n"
    monkeypatch.setattr(config, "TRY_PATTERNS", waiting + config.TRY_PATTERNS)
    layers = {f"layers.{n}.self_attn.{p}_proj": 4 for n in range(40) for p in "qkvo"}
    edit(plainly(folder), rank_pattern=layers)
    assert load_adapter(folder, bank.base)


def test_keys_that_peft_ignores_are_reported(bank: Bank, folder: Path) -> None:
    wanted = load_adapter(folder, bank.base).weights
    edit(plainly(folder), trained_with="a tool 1.2", an_option_of_tomorrow=3)
    adapter = load_adapter(folder, bank.base)
    assert all(torch.equal(adapter.weights[k][1], wanted[k][1]) for k in wanted)
    (note,) = [note for note in adapter.notes if "ignores" in note]
    assert "trained_with, an_option_of_tomorrow" in note


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
