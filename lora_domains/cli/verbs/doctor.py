"""The verb doctor. torch is imported late."""

import argparse

from lora_domains.cli.parser import Verbs, add_verb
from lora_domains.console import Display

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
            "scikit-learn")  # fmt: skip


def add_doctor(verbs: Verbs) -> None:
    add_verb(
        verbs, "doctor", doctor,
        group="more",
        summary="show installed packages and devices",
        usage="",
        description="Show the versions of the packages that matter, and the devices. Writes "
        "nothing.",
        example="lora-domains doctor",
    )  # fmt: skip


def doctor(_: argparse.Namespace) -> int:
    """Show the versions of packages, and the devices."""
    from importlib.metadata import PackageNotFoundError, version

    display = Display()
    for package in PACKAGES:
        try:
            display.line(f"{package:<14} {version(package)}")
        except PackageNotFoundError:
            display.line(f"{package:<14} missing: pip install {package}")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            display.line(f"{'device':<14} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        display.line(f"{'device':<14} CPU only, {torch.get_num_threads()} threads")
    return 0
