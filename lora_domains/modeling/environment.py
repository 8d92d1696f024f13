"""The environment of a run: versions, device, seed and commit."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from lora_domains import __version__
from lora_domains.distributed import state
from lora_domains.modeling.base import Base


def environment(base: Base, seed: int) -> dict[str, Any]:
    """The ``environment`` entry of a card."""
    import accelerate
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "lora_domains": __version__,
        "device": _device_name(base.device),
        "world_size": state().num_processes,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git": _git(),
        **({} if base.quantization is None else {"bitsandbytes": version("bitsandbytes")}),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git() -> str | None:
    """The current commit of the working folder's git repository, if there is one."""
    import subprocess

    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
