"""What this machine has for a run: packages, extras, devices, memory, bases, and the Hub."""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from lora_domains.cli.recipes import bases_at_hand, public_name
from lora_domains.console import format_bytes
from lora_domains.errors import listed

PACKAGES = ("lora-domains", "torch", "transformers", "peft", "accelerate", "bitsandbytes",
            "datasets", "scikit-learn")  # fmt: skip
OWN = ("test", "check", "benchmarks", "docs")
"""Extras for the development of this package."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""Variables that keep libraries from the network."""
PATIENCE = 3.0
"""Seconds to wait for the Hub."""


def machine() -> dict[str, Any]:
    """Everything, as JSON. torch is imported for the devices."""
    import psutil
    import torch

    from lora_domains.inference.memory import free_bytes

    memory = {"total_bytes": psutil.virtual_memory().total,
              "free_bytes": free_bytes(torch.device("cpu"))}  # fmt: skip
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": _extras(),
        "devices": _devices(),
        "memory": memory,
        "disk": {"free_bytes": shutil.disk_usage(Path.cwd()).free},
        "bases": _bases(),
        "hub": _hub(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, dict[str, Any]]:
    """extra → the packages that it lacks, and how to install them."""
    try:
        declared = metadata("lora-domains")
    except PackageNotFoundError:  # a checkout that was never installed
        return {}
    needed = declared.get_all("Requires-Dist") or []
    extras = {}
    for extra in declared.get_all("Provides-Extra") or []:
        names = [re.split(r"[^\w.-]", one)[0] for one in needed
                 if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", one)]  # fmt: skip
        if extra not in OWN:
            missing = [name for name in names if _version(name) is None]
            extras[extra] = {"missing": missing, "install": f"pip install 'lora-domains[{extra}]'"}
    return extras


def _devices() -> list[dict[str, Any]]:
    """The devices that torch can use, the fastest first; the CPU has threads."""
    import torch

    devices: list[dict[str, Any]] = [
        {"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index),
         "memory_bytes": torch.cuda.get_device_properties(index).total_memory}
        for index in range(torch.cuda.device_count())
    ]  # fmt: skip
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return [*devices, {"device": "cpu", "threads": threads, "cores": cores}]


def _bases() -> list[dict[str, Any]]:
    return [
        {"base": public_name(place), "for": use,
         "bytes": sum(path.stat().st_size for path in place.glob("*.safetensors"))}
        for use, places in bases_at_hand().items() for place in places
    ]  # fmt: skip


def _hub() -> dict[str, Any]:
    """Whether the Hub can be reached (None: it is not asked, because a variable says so)."""
    from huggingface_hub import constants, get_session

    offline = {name: os.environ[name] for name in OFFLINE if os.environ.get(name)}
    found = {"endpoint": constants.ENDPOINT, "cache": constants.HF_HUB_CACHE, "offline": offline}
    if constants.HF_HUB_OFFLINE:
        return {**found, "reachable": None}
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of the HTTP library, whichever the installed version uses
        return {**found, "reachable": False}
    return {**found, "reachable": True}


def in_lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts of ``machine`` as lines to read, each with a name."""
    yield "python", f"{found['python']}, {found['system']}"
    for name, installed in found["packages"].items():
        yield name, installed or f"missing: pip install {name}"
    missing = {name: extra for name, extra in found["extras"].items() if extra["missing"]}
    if ready := [name for name in found["extras"] if name not in missing]:
        yield "extras", f"{listed(ready, 99)} installed"
    for name, extra in missing.items():
        yield "missing", f"{name} ({listed(extra['missing'], 99)}): {extra['install']}"
    for device in found["devices"]:
        if "threads" in device:
            yield "cpu", f"{device['cores']} cores, of which torch uses {device['threads']}"
        else:
            size = device.get("memory_bytes")
            memory = f", {format_bytes(size)}" if size else ""
            yield device["device"], f"{device['name']}{memory}"
    memory, disk = found["memory"], found["disk"]
    total, free = format_bytes(memory["total_bytes"]), format_bytes(memory["free_bytes"])
    yield "memory", f"{total}, {free} free; {format_bytes(disk['free_bytes'])} free on the disk"
    for base in found["bases"]:
        yield "base", f"{base['base']}, {format_bytes(base['bytes'])}: {base['for']}"
    if not found["bases"]:
        yield "base", "none at hand but the embedded one, for trials: hf download OWNER/NAME"
    yield "Hub", _reached(found["hub"])


def _reached(hub: Mapping[str, Any]) -> str:
    if hub["reachable"] is None:
        given = listed(f"{name}={value}" for name, value in hub["offline"].items())
        return f"not asked, because of {given}; bases and rows come from {hub['cache']}"
    if hub["reachable"]:
        return f"{hub['endpoint']} answers"
    return f"{hub['endpoint']} does not answer; HF_HUB_OFFLINE=1 saves the wait"
