"""Base formats: safetensors, and one that is added from outside the package."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import logits, save, strong

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import BaseModelError
from lora_domains.modeling import checkpoint
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.checkpoint import Checkpoint, TensorInfo, read_header


class Npz(Checkpoint):
    """float32 weights in one NumPy archive, converted when they are read."""

    pattern = "*.npz"

    def _arrays(self) -> Mapping[str, np.ndarray]:
        arrays: Mapping[str, np.ndarray] = np.load(self.files[0])
        return arrays

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo("F32", array.shape) for name, array in self._arrays().items()}

    def content(self, name: str) -> Iterator[bytes]:
        yield self._arrays()[name].tobytes()

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays()[name])

    def load(self, architecture: Any, **options: Any) -> tuple[Any, list[str]]:
        model = architecture.from_config(self.config(), dtype=options["dtype"])
        state = {name: self.tensor(name) for name in self.tensors}
        missing, _ = model.load_state_dict(state, strict=False)
        model.tie_weights()
        return model, [name for name in missing if name not in model.all_tied_weights_keys]


@pytest.fixture
def npz_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with its weights in the other format."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in tiny_base.iterdir():
        if path.suffix == ".safetensors":
            np.savez(folder / "model.npz", **{k: v.numpy() for k, v in load_file(path).items()})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_format_is_added_by_one_class(
    tiny_base: Path, npz_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BaseModelError, match=r"model\*\.safetensors or \*\.gguf weights"):
        load_base(npz_base)
    monkeypatch.setattr(checkpoint, "FORMATS", [*checkpoint.FORMATS, Npz])
    plain, converted = load_base(tiny_base, device="cpu"), load_base(npz_base, device="cpu")
    assert isinstance(converted.checkpoint, Npz)
    assert converted.identity == plain.identity
    assert converted.state_digest() == plain.state_digest()
    assert torch.equal(logits(converted), logits(plain))
    name = next(iter(plain.checkpoint.tensors))
    wanted, found = plain.stored_tensor(name), converted.stored_tensor(name)
    assert wanted is not None
    assert found is not None
    assert torch.equal(found, wanted)

    # An adapter does not depend on the format of its base.
    folder = save(tmp_path / "adapter", strong(plain), plain)
    bank = Bank(converted)
    bank.add(load_adapter(folder, converted))
    own = Bank(plain)
    own.add(strong(plain))
    assert torch.equal(logits(bank, "adapter"), logits(own, "strong"))


def test_a_header_gives_shapes_and_places(tiny_base: Path) -> None:
    path = tiny_base / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    for name, (info, start, stop) in entries.items():
        assert info == TensorInfo("F32", tuple(tensors[name].shape))
        assert content[start:stop] == tensors[name].numpy().tobytes()


def test_a_cut_off_file_is_read_to_its_end(tmp_path: Path, tiny_base: Path) -> None:
    found = checkpoint.find_checkpoint(str(tiny_base), None, "here")
    name = max(found.tensors, key=lambda n: np.prod(found.tensors[n].shape))
    whole = b"".join(found.content(name))
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    path = copy / "model.safetensors"
    cut = checkpoint.find_checkpoint(str(copy), None, "here")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    parts = {n: b"".join(cut.content(n)) for n in cut.tensors}
    assert sum(map(len, parts.values())) < path.stat().st_size
    assert len(parts[name]) <= len(whole)


def test_a_pointer_of_git_lfs_is_no_weights(tiny_base: Path, tmp_path: Path) -> None:
    """Its first bytes, read as the size of a header, are more than any memory holds."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4a5\nsize 269060552\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(BaseModelError, match=r"model\.safetensors is .* a pointer of Git LFS"):
        load_base(folder, device="cpu")


def test_a_config_with_a_value_of_another_type_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="max_position_embeddings"):
        load_base(folder, device="cpu")
