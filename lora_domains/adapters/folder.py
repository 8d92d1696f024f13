"""The folder of a saved adapter: finding it, its files, and replacing it as a whole. No torch.

A repository on the Hub is named with its revision, ``OWNER/NAME@REVISION``: what is loaded is then
what was chosen, and a folder that is missing here is never looked for elsewhere.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from lora_domains.atomic import (
    adapter_name,
    check_name,
    folders_with,
    new_folder,
    repository_of,
    restored,
)
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    UsageError,
    did_you_mean,
    listed,
)
from lora_domains.report.card import CARD, ITEMS, Card

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")
"""A repository, and its revision where one is named."""


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds PEFT's two files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def find_adapter(
    path: str | Path, out: Path, file: str = CONFIG, revision: str | None = None
) -> Path:
    """The folder of an adapter that ``path`` names and that holds ``file``.

    ``path`` is that folder, the name of one in ``out``, or OWNER/NAME@REVISION of a repository on
    the Hub, whose ``revision`` may be given by itself. Raises AdapterError when there is none,
    UsageError for a revision of something else.
    """
    on_hub = repository(str(path), revision)
    for candidate in (Path(path), out / path) if revision is None else ():
        if (restored(candidate) / file).exists():
            return candidate
    if on_hub is not None:
        return downloaded(on_hub, file)
    names = [folder.name for folder in folders_with(out, file)]
    within = [found.parent for found in Path(path).glob(f"*/{file}")]
    within.sort(key=lambda folder: (-len(folder.name), folder.name))
    hint = did_you_mean(str(path), names) if names else "Train one first: lora-domains fit."
    if within:  # the checkpoints of transformers' Trainer
        hint = f"Name one of the folders in it: {listed(within, 5)}."
    if ON_HUB.fullmatch(str(path)):
        hint += f" An adapter on the Hub needs its revision: {path}@REVISION."
    raise AdapterError(
        where=str(path),
        expected=f"an adapter folder with {file}, or the name of one in {out}",
        found=f"none there, and {listed(names) or 'none'} in {out}",
        hint=hint,
    )


def folders_by_name(adapters: Sequence[str], out: Path) -> dict[str, Path]:
    """The folders of ``adapters`` by their names; what the shell's * names besides is left out.

    Raises UsageError for two of one name, and AdapterError for one that is not found.
    """
    named: list[str] = []
    for adapter in adapters:
        path = Path(adapter)
        found = [] if path.exists() else sorted(path.parent.glob(path.name))
        named += map(str, found) if found else [adapter]  # Windows leaves * as it is
    others = [
        name for name in named if len(named) > 1 and Path(name).exists()
        and not any((place / CONFIG).exists() for place in (Path(name), out / name))
    ]  # fmt: skip
    if named and len(others) == len(named):
        raise UsageError(
            expected="an adapter folder, or several",
            found=f"no adapter folder among {listed(others, 3)}",
            hint="For example adapters/*",
        )
    folders: dict[str, Path] = {}
    for adapter in (name for name in named if name not in others):
        folder = find_adapter(adapter, out)
        name = adapter_name(folder)
        if folder.resolve() != folders.setdefault(name, folder).resolve():
            raise UsageError(
                where=adapter,
                expected="adapters of different names",
                found=f"two called {name!r}",
                hint="Rename one of the folders.",
            )
    return folders


def check_one_base(
    folders: Iterable[Path], where: str, command: Callable[[Sequence[Path]], str],
    advice: str = "One command for each base:",
) -> None:  # fmt: skip
    """Raise AdapterMismatch where the cards of adapters are of several bases.

    Its hint has, after the ``advice``, the ``command`` for the adapters of each base. An adapter
    that was not trained here is not known to be of another one than those, and goes with the ones
    of the base on which it was evaluated.
    """
    ours: dict[str, list[Path]] = {}
    bases: dict[str, str] = {}
    cards = {folder: Card.read(folder, measured=False) for folder in folders
             if (folder / CARD).is_file()}  # fmt: skip
    trained_here = {card.base.identity for card in cards.values()
                    if not card.adapter.trained_elsewhere}  # fmt: skip
    if len(trained_here) < 2:
        return
    for folder, card in cards.items():
        ours.setdefault(card.base.identity, []).append(folder)
        bases[card.base.identity] = card.base.id
    if len({*bases.values()}) < len(bases):
        bases = {identity: f"{name} ({identity[:12]})" for identity, name in bases.items()}
    found = [f"{listed(map(adapter_name, own), 5)} of {bases[key]}" for key, own in ours.items()]
    commands = [command(own) for own in ours.values()]
    raise AdapterMismatch(
        where=where,
        expected="adapters of one base",
        found="; ".join(found),
        hint="\n".join([advice, *commands]),
    )


def own_folder(folder: Path, place: Path) -> Path:
    """Where the card of the adapter in ``folder`` is written: there, or for one in the Hub's cache,
    which is shared, in ``place``.

    Raises AdapterError where something else is in that place.
    """
    if repository_of(folder) is None:
        return folder
    if place.exists() and not (is_adapter(place) and fingerprint(place) == fingerprint(folder)):
        raise AdapterError(
            where=str(place),
            expected=f"a free place for {repository_of(folder)}",
            found="something else of that name",
            hint="Choose another --out.",
        )
    return place


# ── The Hub ─────────────────────────────────────────────────────────────────────────────────────


class Repository(NamedTuple):
    """An adapter on the Hub at one revision: a commit, or a branch or tag, which may move."""

    id: str
    revision: str

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}"


def repository(name: str, revision: str | None = None) -> Repository | None:
    """The repository that ``name`` and ``revision`` stand for; None unless there is a revision.

    Raises UsageError for two revisions, and for a revision of what is no repository.
    """
    match = ON_HUB.fullmatch(name)
    named = match and match[2]
    if revision is not None and (match is None or named):
        raise UsageError(
            where=name,
            expected="OWNER/NAME of a repository on the Hub, and one revision",
            found=f"revision={revision!r} as well" if named else f"{name!r}",
            hint="For example load_adapter('OWNER/NAME', revision='3f1c…').",
        )
    chosen = revision or named
    return Repository(match[1], chosen) if match and chosen else None


def downloaded(wanted: Repository, file: str) -> Path:
    """The folder of ``wanted`` in the Hub's cache, downloaded if it is not there.

    Raises AdapterError where the Hub does not answer or has no such repository, revision or
    adapter: one with ``file``.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    patterns = ["adapter_*", CARD, ITEMS, "README.md"]
    try:
        folder = Path(
            snapshot_download(wanted.id, revision=wanted.revision, allow_patterns=patterns)
        )
    except (GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        raise AdapterError(
            where=str(wanted),
            expected="a repository on the Hub that you may read",
            found=f"none of that name, or a private one ({type(error).__name__})",
            hint="Check the name; for a private one, log in: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(
            where=str(wanted),
            expected=f"a revision of {wanted.id}",
            found=f"no commit, branch or tag {wanted.revision!r}",
            hint="Its page on the Hub lists the commits (Files, History).",
        ) from error
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise AdapterError(
            where=str(wanted),
            expected="an adapter in the Hub's cache, or an answer of the Hub",
            found=f"neither ({type(error).__name__})",
            hint=f"Go online; or on another machine: hf download {wanted.id} --revision "
            f"{wanted.revision} --local-dir {wanted.id.split('/')[1]}, then copy the folder here "
            "and name it instead.",
        ) from error
    if not (folder / file).is_file():
        raise AdapterError(
            where=str(wanted),
            expected=f"an adapter: a repository with {file}",
            found=listed(sorted(path.name for path in folder.iterdir())) or "no file of one",
            hint="Choose another revision, or a repository with an adapter of PEFT.",
        )
    return folder


# ── Its files ───────────────────────────────────────────────────────────────────────────────────


def fingerprint(folder: Path, pages: bytes | mmap | None = None) -> str:
    """sha256 over the adapter's config and weights as stored.

    ``pages`` is the weights file, if it is mapped already.
    """
    digest = sha256((folder / CONFIG).read_bytes())
    digest.update(mapped(folder / WEIGHTS) if pages is None else pages)
    return digest.hexdigest()


def check_digest(folder: Path, stored: str, digest: str | None = None) -> None:
    """Raise AdapterCorrupt unless config and weights have the sha256 that the card stores.

    ``digest`` is that of the files, if it is known.
    """
    digest = fingerprint(folder) if digest is None else digest
    if stored != digest:
        raise AdapterCorrupt(
            where=folder.name,
            expected=f"files with the sha256 in the card ({stored[:12]})",
            found=f"sha256 {digest[:12]}: a byte of {CONFIG} or {WEIGHTS} was changed",
            hint="Copy the adapter folder again; if you changed it on purpose, remove card.json.",
        )


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
    folder: Path, card: Card, readme: Callable[[Card], str], items: list[dict[str, Any]],
    place: Path | None = None,
) -> None:  # fmt: skip
    """Replace card, README and items of the adapter in ``folder``, and keep its weights.

    With a ``place``, the whole adapter is written there (``own_folder``).
    """
    with replacing(place or folder) as fresh:
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
