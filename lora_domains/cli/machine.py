"""What this machine has for a run: packages, extras, devices, memory, bases, and the Hub."""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata, version
from itertools import count
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import check_one_base
from lora_domains.analysis.reproduce import BASES
from lora_domains.console import format_bytes
from lora_domains.domain import Domain
from lora_domains.errors import UsageError, listed

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

    from lora_domains.inference.cache import cache_bytes, cache_folder, cache_limit
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
        "cache": {"folder": str(cache_folder()), "bytes": cache_bytes(), "limit": cache_limit()},
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
    cache = found["cache"]
    kept, most = (format_bytes(cache[name]) for name in ("bytes", "limit"))
    yield "cache", f"{kept} of at most {most} that bases computed, in {cache['folder']}"
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


# ── Bases at hand ───────────────────────────────────────────────────────────────────────────────

ENCODER, INSTRUCT = "an encoder, for labels", "an instruct model, for answers"
SENTENCES = "modules.json"
"""A file of every sentence encoder."""
EXAMPLES = {
    ENCODER: "sentence-transformers/all-MiniLM-L6-v2",
    INSTRUCT: "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def with_base(domain: Domain, flags: argparse.Namespace) -> tuple[Domain, str]:
    """The domain with a head where the base needs one, and a sentence about the base.

    That is a sentence encoder that is at hand, and any encoder that ``--base auto`` found.

    What was found is written into ``flags``. Without --base, the sentence says which base
    real work would take; it is empty for embedded rows. Raises UsageError where nothing is at hand.
    """
    asked, rows = flags.base, str(domain.data.train or "")
    repeated = getattr(flags, "from_card", None)
    if asked and asked != "auto" and not repeated and not domain.task.head:
        place = next(iter(_cached(asked)), Path(asked))
        if (place / SENTENCES).is_file() and (headed := domain.task.with_head()) is not None:
            why = f"{public_name(place)}, a sentence encoder: with a head"
            return replace(domain, task=headed), why
    if asked != "auto" and (asked or not rows or rows.startswith("embedded:") or repeated):
        return domain, ""
    wanted = ENCODER if domain.task.with_head() is not None else INSTRUCT
    at_hand = bases_at_hand()
    if wanted not in at_hand and INSTRUCT in at_hand:
        wanted = INSTRUCT
    found = at_hand.get(wanted, [])
    name = public_name(found[0]) if found else EXAMPLES[wanted]
    if not asked:
        way = f"--base {name}{' --head' if wanted == ENCODER else ''}"
        if found:
            way = f"--base auto, which takes {name}"
        return domain, f"the embedded one, for trials; for real work: {way}"
    if not found:
        raise UsageError(
            where="--base auto",
            expected=f"{wanted}, in .bases/ or in the cache of the Hub",
            found="none",
            hint=f"Download one, for example: hf download {name}",
        )
    flags.base = str(found[0]) if name == found[0].name else name
    flags.revision = None if name == found[0].name else found[0].name
    headed = domain.task.with_head() if wanted == ENCODER else None
    return (
        replace(domain, task=headed) if headed else domain,
        f"{name}, the smallest at hand of its kind: {wanted}; --base names another",
    )


def _cached(name: str = "*") -> list[Path]:
    """The folders of a base, or of all, in the cache of the Hub."""
    from huggingface_hub import constants

    models = f"models--{name.replace('/', '--')}/snapshots/*/config.json"
    return [path.parent for path in Path(constants.HF_HUB_CACHE).glob(models)]


def bases_at_hand(folder: Path = BASES) -> dict[str, list[Path]]:
    """The bases in ``folder`` and in the cache of the Hub by what they are for, smallest first."""
    places = [*(path.parent for path in folder.glob("*/config.json")), *_cached()]
    found: dict[str, list[tuple[int, Path]]] = {}
    for place in places:
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        if size and (kind := _use_of(place)):
            found.setdefault(kind, []).append((size, place))
    return {kind: [place for _, place in sorted(these)] for kind, these in found.items()}


def _use_of(place: Path) -> str | None:
    """What the base in a folder is for; None where its files do not say."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        names = " ".join(config.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    if (place / SENTENCES).is_file() or "ForMaskedLM" in names:
        return ENCODER
    settings = place / "tokenizer_config.json"
    has_template = (place / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in settings.read_text(encoding="utf-8")
    )
    return INSTRUCT if "ForCausalLM" in names and has_template else None


def public_name(place: Path) -> str:
    """The name of a base: that of its folder, or its id on the Hub for one in the Hub's cache."""
    cached = [part for part in place.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else place.name


def check_bases(verb: str, folders: Iterable[Path], port: int = 0, out: str = "") -> None:
    """Raise AdapterMismatch where adapters are of several bases, with a command for each of them.

    Each has its own port, or its own folder ``out``, where they are given.
    """
    numbers = count()

    def command(ours: Sequence[Path]) -> str:
        at = next(numbers)
        own = ["--port", str(port + at)] if port else []
        own += ["--out", f"{out}-{at + 1}"] if out else []
        return shlex.join(["lora-domains", *verb.split(), *map(str, ours), *own])

    check_one_base(folders, f"lora-domains {verb}", command)
