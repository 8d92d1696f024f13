"""The verb push: what of an adapter would be sent to the Hub, and sending it. No torch.

A push holds no text of a row: ids in ``items.jsonl`` are the positions of rows, digests are keyed
with a secret that stays here. An adapter whose files hold text is refused unless that is asked for.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import (
    CONFIG,
    README,
    WEIGHTS,
    check_digest,
    find_adapter,
    is_adapter,
)
from lora_domains.cli.parser import Verbs, add_out_flag, add_verb
from lora_domains.console import Display
from lora_domains.errors import AdapterError, UsageError, listed
from lora_domains.report.card import CARD, ITEMS, Card, read_items

PUSHED = (CONFIG, WEIGHTS, CARD, README, ITEMS)
"""The files of an adapter that are pushed."""
TEXTS = ("text", "answers")
"""The keys of an item that hold text of a row."""


def add_verbs(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs, "push", push,
        usage="ADAPTER OWNER/NAME [options]",
        description="Push an adapter to a repository on the Hub, which is created where there is "
        "none: private, unless --public is given. Writes one commit there with the adapter, its "
        "card, its README and the scores of its rows, and nothing here. No text of a row is "
        "pushed: rows have numbers and keyed digests. A failing verdict is pushed as well, with a "
        "warning: the README begins with it.",
        example="lora-domains push triage hospital/triage --dry-run",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("adapter", metavar="ADAPTER", help="its folder, or its name in --out")
    inputs.add_argument("repository", metavar="OWNER/NAME", help="the repository on the Hub")
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--public", action="store_true", help="let everybody read the repository, if it is new")
    add("--licence", "--license", metavar="ID", help="licence of the adapter, such as apache-2.0, "
        "which its owner states; default: none")  # fmt: skip
    add("--show-text", action="store_true", help="also push text of rows, if the adapter was "
        "evaluated with --show-text")  # fmt: skip
    add("--dry-run", action="store_true", help="show which files and how many bytes would be sent, "
        "and send nothing")  # fmt: skip


def push(flags: argparse.Namespace) -> int:
    """Push an adapter, or show what would be pushed."""
    display = Display()
    folder = find_adapter(flags.adapter, Path(flags.out), CARD)
    found = prepared(
        folder, flags.repository, public=flags.public, licence=flags.licence,
        show_text=flags.show_text,
    )  # fmt: skip
    _show(found, display)
    if flags.dry_run:
        display.line("Dry run: nothing was sent.")
        return 0
    sent = send(found)
    display.line(f"Pushed: {sent.url} (commit {sent.commit})")
    if sent.public != found.public:
        display.warn(f"the repository is private; {sent.url}/settings makes it public.")
    display.line(f"To use it: lora-domains predict {found.repository}@{sent.commit} 'a text'")
    return 0


def _show(found: "Push", display: Display) -> None:
    """The files of a push, what is left out, and what its readers should know."""
    entry = found.card.adapter
    display.title(f"{entry.path} to {found.repository} ({found.visibility})")
    for name, size in found.sizes.items():
        display.line(f"{name:<27}{size:>13,} bytes")
    display.line(f"{f'{len(found.files)} files':<27}{sum(found.sizes.values()):>13,} bytes")
    if found.left_out:
        display.line(f"Not pushed: {listed(found.left_out)}")
    if found.holds_text:
        display.warn(f"{ITEMS} holds the text of rows, which is pushed.")
    elif ITEMS in found.files:
        display.line(f"{ITEMS} holds numbers of rows, keyed digests and scores; no text of a row.")
    if entry.verdict != "pass":
        known = "was not evaluated" if entry.verdict is None else f"has the verdict {entry.verdict}"
        display.warn(f"{entry.path} {known}; its README says so first.")


# ── What would be sent ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Push:
    """What a push would send, checked and in full: nothing is left to decide."""

    folder: Path
    repository: str
    public: bool
    card: Card
    files: Mapping[str, bytes | Path]
    """The content of each file, or where it is, by its name in the repository."""
    left_out: tuple[str, ...]
    """What else is in the folder, which stays here."""
    holds_text: bool
    """Whether text of rows is in the files."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }

    @property
    def visibility(self) -> str:
        return "public" if self.public else "private"


def prepared(
    folder: Path, repository: str, *, public: bool = False, licence: str | None = None,
    show_text: bool = False,
) -> Push:  # fmt: skip
    """The push of the adapter in ``folder``; nothing is sent, and no network is needed.

    ``licence`` is what the owner of the adapter states. Raises UsageError for a name that the Hub
    does not take, AdapterError for an adapter without a card or whose files hold text without
    ``show_text``, AdapterCorrupt for files that were changed.
    """
    _check_name(repository)
    if not (is_adapter(folder) and (folder / CARD).is_file()):
        raise AdapterError(
            where=folder.name,
            expected=f"an adapter with {CONFIG}, {WEIGHTS} and {CARD}",
            found=listed(sorted(path.name for path in folder.iterdir())) or "an empty folder",
            hint="Evaluate it first, which writes its card: lora-domains evaluate.",
        )
    card = Card.read(folder)
    check_digest(folder, str(card.adapter.sha256))
    present = {path.name for path in folder.iterdir()}
    holds_text = _holds_text(folder, card)
    if holds_text and not show_text:
        raise AdapterError(
            where=folder.name,
            expected="files without the text of rows",
            found=f"an adapter that was evaluated with --show-text: {ITEMS} holds text",
            hint="Evaluate it again without --show-text, or add --show-text to push that text too.",
        )
    files: dict[str, bytes | Path] = {n: folder / n for n in PUSHED if n in present}
    if README in files:
        text = (folder / README).read_text(encoding="utf-8", errors="replace")
        files[README] = _readme_on_hub(text, card, repository, licence).encode()
    left_out = tuple(sorted(present - files.keys()))
    return Push(folder, repository, public, card, files, left_out, holds_text)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(repository)
        if "/" in repository:
            return
    raise UsageError(
        where="lora-domains push",
        expected="OWNER/NAME, a repository on the Hub",
        found=repr(repository),
        hint="OWNER is your name on the Hub, or an organisation: hf auth whoami shows both.",
    )


def _holds_text(folder: Path, card: Card) -> bool:
    """Whether the items or the card hold the text of a row or an answer."""
    mistakes = card.adapter.mistakes or []
    items = read_items(folder) if (folder / ITEMS).is_file() else []
    return any(key in row for row in (*items, *mistakes) for key in TEXTS)


def _readme_on_hub(text: str, card: Card, repository: str, licence: str | None) -> str:
    """The README with the repository in its code, and the licence that its owner states."""
    from huggingface_hub import ModelCard

    place = json.dumps(f"path/to/{card.adapter.path}")
    text = text.replace(f"load_adapter({place})", f'load_adapter("{repository}@main")')
    if place in text:
        text = text.replace(place, f'snapshot_download("{repository}")')
        plain = "from peft import PeftModel\n"
        text = text.replace(plain, f"from huggingface_hub import snapshot_download\n{plain}", 1)
    if licence is None:
        return text
    readme = ModelCard(text)
    readme.data["license"] = licence
    return str(readme)


# ── Sending ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pushed:
    """Where a push went."""

    url: str
    commit: str
    public: bool


def send(found: Push) -> Pushed:
    """Create the repository if there is none, and add one commit with the files of ``found``.

    Raises AdapterError where the Hub cannot be reached or refuses, and where the repository is
    public and ``found`` is not.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(), found.repository
    with _named_errors(found):
        api.create_repo(name, private=not found.public, exist_ok=True)
        known = api.model_info(name)
        if not found.public and known.private is False:
            raise AdapterError(
                where=name,
                expected="a private repository, or none of that name",
                found="a public one",
                hint="Add --public if everybody may read it, or choose another name.",
            )
        there = {file.rfilename for file in known.siblings or ()}
        gone = [file for file in PUSHED if file in there and file not in found.files]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(file, content) for file, content in found.files.items()),
                *(CommitOperationDelete(file) for file in gone),
            ],
            commit_message=f"Push {found.card.adapter.path} ({found.card.adapter.outcome})",
        )
    return Pushed(f"{api.endpoint}/{name}", str(commit.oid), known.private is False)


@contextmanager
def _named_errors(found: Push) -> Iterator[None]:
    """Turn what the Hub's client raises into an AdapterError that says how to go on."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    unreachable: tuple[type[Exception], ...] = (OSError, RuntimeError, *no_connection())
    copied = f"Or copy the folder {found.folder} to where it is needed."
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise AdapterError(
            where=found.repository,
            expected="the Hub",
            found="HF_HUB_OFFLINE, which switches the network off",
            hint=f"Unset it. {copied}",
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        response: Any = getattr(error, "response", None)
        status = getattr(response, "status_code", 401)
        if status >= 500:
            raise _unreachable(found, f"its error {status}", copied) from error
        raise AdapterError(
            where=found.repository,
            expected=f"a token that may write to {found.repository.split('/')[0]}",
            found=f"an answer of {status} from the Hub",
            hint="Log in with a token that has the role write: hf auth login (or set HF_TOKEN).",
        ) from error
    except unreachable as error:
        raise _unreachable(found, type(error).__name__, copied) from error


def no_connection() -> tuple[type[Exception], ...]:
    """What the HTTP library of the Hub's client raises without a connection."""
    errors: list[type[Exception]] = []
    for library in ("httpx", "httpx2"):
        with suppress(ImportError):
            errors.append(import_module(library).TransportError)
    return tuple(errors)


def _unreachable(found: Push, why: str, copied: str) -> AdapterError:
    return AdapterError(
        where=found.repository,
        expected="an answer of the Hub",
        found=f"none ({why}); nothing of this push is visible there",
        hint=f"Go online and push again. {copied}",
    )
