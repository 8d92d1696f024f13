"""Trackers through Accelerate: the numbers of a run for TensorBoard, Weights & Biases or Trackio.

Only numbers and numeric settings are logged, by name: no row, file name or prediction. No service
is contacted unless a tracker is requested.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_domains.errors import UsageError, check_installed, did_you_mean

TRACKERS = ("tensorboard", "wandb", "trackio")
LOGS = ".runs"
"""Folder under the output folder for trackers that write files."""

PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
"""Settings of wandb. Without them it sends the command with its file names, the output, the host,
its packages and the code."""

Log = Callable[[Mapping[str, Any], int], None]


def no_tracker(_values: Mapping[str, Any], _step: int) -> None:
    """Logs nothing."""


def check_tracker(name: str) -> None:
    """Raise UsageError unless ``name`` is a supported tracker and installed."""
    if name not in TRACKERS:
        raise UsageError(
            where="--tracker",
            expected="one of " + ", ".join(TRACKERS),
            found=repr(name),
            hint=did_you_mean(name, TRACKERS),
        )
    # Accelerate takes either of two packages for TensorBoard; the extra has the second one.
    package = name if name != "tensorboard" or find_spec(name) else "tensorboardX"
    check_installed("--tracker", f"the package {package}", name, [package])


def open_tracker(
    name: str, domain: str, out: Path, settings: Mapping[str, Any]
) -> tuple[Log, Callable[[], None]]:
    """The functions (log, close) of one run; ``settings`` are numbers by name."""
    from accelerate import Accelerator

    folder = out / LOGS
    accelerator = Accelerator(log_with=name, project_dir=str(folder))
    own = {"wandb": {"dir": str(folder), "settings": PRIVATE}}
    accelerator.init_trackers(domain, config=dict(settings), init_kwargs=own)

    def log(values: Mapping[str, Any], step: int) -> None:
        accelerator.log(numbers(values), step=step)

    def close() -> None:
        # Not end_training(): it destroys the process group, which the evaluation still needs.
        if accelerator.is_main_process:
            for tracker in accelerator.trackers:
                tracker.finish()

    return log, close


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``values``, without texts, booleans and missing values."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
