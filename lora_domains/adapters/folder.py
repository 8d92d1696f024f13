"""The folder of a saved adapter: its files, finding it, and replacing it as a whole. No torch."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_domains.atomic import folders_with, new_folder, restored
from lora_domains.domain import check_name
from lora_domains.errors import AdapterError, did_you_mean, listed
from lora_domains.report.card import CARD, ITEMS, Card

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds PEFT's two files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def find_adapter(path: str | Path, out: Path, file: str = CONFIG) -> Path:
    """``path`` itself, or the adapter of that name in ``out``, whichever holds ``file``.

    Raises AdapterError when there is none.
    """
    for candidate in (Path(path), out / path):
        if (restored(candidate) / file).exists():
            return candidate
    names = [folder.name for folder in folders_with(out, file)]
    raise AdapterError(
        where=str(path),
        expected=f"an adapter folder with {file}, or the name of one in {out}",
        found=f"none there, and {listed(names) or 'none'} in {out}",
        hint=did_you_mean(str(path), names) if names else "Train one first: lora-domains fit.",
    )


def fingerprint(folder: Path, pages: bytes | mmap | None = None) -> str:
    """sha256 over the adapter's config and weights as stored.

    ``pages`` is the weights file, if it is mapped already.
    """
    digest = sha256((folder / CONFIG).read_bytes())
    digest.update(mapped(folder / WEIGHTS) if pages is None else pages)
    return digest.hexdigest()


def mapped(path: Path) -> bytes | mmap:
    """The bytes of a file, read from disk when they are used; writes do not reach the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap(file.fileno(), 0, access=ACCESS_COPY) if size else b""


@contextmanager
def replacing(folder: Path, mark: str = CONFIG) -> Iterator[Path]:
    """A new folder to write into; it replaces ``folder`` when the block succeeds.

    A process killed at any moment leaves the old folder or the new one. Raises AdapterError when
    the disk refuses, or when something without the file ``mark`` is in that place.
    """
    check_name(folder.name)
    try:
        _refuse_others(restored(folder.resolve()), mark)
        with new_folder(folder) as fresh:
            yield fresh
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            where=folder.name,
            expected="a disk that takes the adapter",
            found=getattr(error, "strerror", None) or str(error),
            hint="Free some space or choose another --out. What was saved before is untouched.",
        ) from error


def rewrite_card(
    folder: Path, card: Card, readme: Callable[[Card], str], items: list[dict[str, Any]]
) -> None:
    """Replace card, README and items of the adapter in ``folder``, and keep its weights."""
    with replacing(folder) as fresh:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, fresh / name)
        write_card(fresh, card, readme, items)


def write_card(
    folder: Path, card: Card, readme: Callable[[Card], str], items: list[dict[str, Any]]
) -> None:
    """Write card, README and items into a folder that is still being made."""
    for name, text in card_files(card, readme, items).items():
        (folder / name).write_bytes(text.encode())  # without the line ends of Windows


def card_files(
    card: Card, readme: Callable[[Card], str], items: list[dict[str, Any]]
) -> dict[str, str]:
    """The text of card, README and items, by the names of their files."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    return {CARD: card.dumps(), README: readme(card), ITEMS: lines}


def _refuse_others(folder: Path, mark: str) -> None:
    """Never replace anything but an adapter: a mistaken name must not delete a folder."""
    if folder.exists() and not (folder / mark).exists():
        present = "a file"
        if folder.is_dir():
            present = listed(sorted(p.name for p in folder.iterdir()), 3)
        if present:
            raise AdapterError(
                where=folder.name,
                expected=f"a folder with {mark}, an empty one or nothing in that place",
                found=present,
                hint="Choose another name or another --out.",
            )
