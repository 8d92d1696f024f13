"""The device on which the tests of the contracts run: the CPU, or that of ``--device``.

Only tests marked ``contract`` use it. A ``conftest.py`` that pytest reads at its start is imported
before it is set, and all that it imports too: a tensor of a module would be on the CPU.
"""

from pathlib import Path
from typing import Any

name = "cpu"


def use(chosen: str) -> None:
    """Let the tests run on ``chosen``; raises ValueError if it is not there."""
    global name
    if chosen.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"--device {chosen}: torch {torch.__version__} finds no GPU here")
        torch.backends.cuda.matmul.allow_tf32 = False  # the tolerances are those of float32
    elif chosen != "cpu":
        raise ValueError(f"--device {chosen}: expected cpu or cuda")
    name = chosen


def base_on(folder: Path | None = None, **options: Any) -> Any:
    """The base in ``folder``, or the embedded one, on that device; by default in float32."""
    from lora_domains.modeling.base import load_base

    return load_base(folder, device=name, **{"dtype": "float32"} | options)
