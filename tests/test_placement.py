"""Where a base lies: a device map changes where weights are, and no result."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.adapters import logits, strong
from support.models import declared

from lora_domains.errors import BaseModelError, LoraDomainsError, UsageError
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.checkpoint import TensorInfo
from lora_domains.modeling.quantization import mapped_dtype

ON_DISK = {
    "model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk",
    "model.layers.0": "cpu", "model.layers.1": "disk",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_base: Path) -> Bank:
    return with_adapters(Bank(load_base(tiny_base)))


@pytest.fixture(scope="module")
def on_disk(tiny_base: Path) -> Bank:
    return with_adapters(Bank(load_base(tiny_base, device_map=ON_DISK)))


def with_adapters(bank: Bank) -> Bank:
    bank.add(strong(bank.base, "a"))
    bank.add(strong(bank.base, "dora", seed=2, dora=True))
    return bank


def test_a_base_partly_on_the_disk_computes_the_same(whole: Bank, on_disk: Bank) -> None:
    offloaded = {name for name, p in on_disk.base.model.named_parameters() if p.is_meta}
    assert len(offloaded) > 5
    assert on_disk.base.resident_bytes() < whole.base.resident_bytes()
    for name in (None, "a", "dora"):
        assert torch.equal(logits(on_disk, name), logits(whole, name))
    assert on_disk.base.state_digest() == whole.base.state_digest()
    assert on_disk.base.record() == whole.base.record()


def test_threads_with_other_adapters_get_their_own_from_the_disk(
    whole: Bank, on_disk: Bank
) -> None:
    wanted = {name: logits(whole, name) for name in (None, "a", "dora")}
    with ThreadPoolExecutor(3) as pool:
        names = [None, "a", "dora"] * 8
        found = list(pool.map(lambda name: logits(on_disk, name), names))
    for name, one in zip(names, found, strict=True):
        assert torch.equal(one, wanted[name])


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_a_base_on_one_device_can_be_trained(
    tiny_base: Path, tmp_path: Path, small_suite: None, whole: Bank, device_map: Any
) -> None:
    model = DomainModel.from_pretrained(tiny_base, device_map=device_map, out=tmp_path)
    assert torch.equal(logits(model.base), logits(whole))
    assert model.fit(declared(make_rows(60), epochs=1, retention="none")) is not None


def test_training_on_layers_that_lie_on_the_disk_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    model = DomainModel.from_pretrained(tiny_base, device_map=ON_DISK, out=tmp_path)
    with pytest.raises(UsageError, match="device map with layers in memory or on the disk"):
        model.fit(declared(make_rows(60)))


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"device_map": {"": "disk"}}, BaseModelError, "an embedding that is loaded anew"),
    ({"device_map": "all"}, UsageError, "expected auto, or a place for each module.*'all'"),
    ({"device_map": "auto", "quantization": "8bit"}, BaseModelError, "found one in 8 bits"),
    ({"device_map": "auto", "sharded": True}, UsageError, "device map or --shard-base; found both"),
    ({"sharded": True}, UsageError, "several processes to share the base; found one"),
    ({"sharded": True, "quantization": "4bit"}, BaseModelError, "found one in 4 bits"),
])  # fmt: skip
def test_a_placement_that_cannot_be_had_is_refused(
    tiny_base: Path, options: dict[str, Any], error: type[LoraDomainsError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_base(tiny_base, **options)


@pytest.mark.parametrize(("stored", "wanted", "read"), [
    (("BF16",), torch.float32, torch.bfloat16),
    (("BF16", "F32"), torch.float32, torch.float32),
    (("F32",), torch.bfloat16, torch.bfloat16),
    (("I8",), torch.float32, torch.float32),
])  # fmt: skip
def test_weights_stay_in_the_file_until_they_are_shared_out(
    stored: tuple[str, ...], wanted: torch.dtype, read: torch.dtype
) -> None:
    tensors = {name: TensorInfo(name, ()) for name in stored}
    assert mapped_dtype(tensors, wanted) == read
