"""The verb playground. torch is imported late."""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_domains.adapters.folder import find_adapter, folders_by_name
from lora_domains.atomic import folders_with
from lora_domains.cli.flags import add_base_flags, add_quiet_flag
from lora_domains.cli.machine import check_bases
from lora_domains.cli.parser import Parser, Verbs, add_out_flag, add_verb
from lora_domains.cli.recipes import open_model
from lora_domains.cli.verbs import predict as predict_verb
from lora_domains.console import Display
from lora_domains.console.display import Advance
from lora_domains.errors import UsageError, check_installed, listed
from lora_domains.report.card import CARD, Card

if TYPE_CHECKING:
    from lora_domains.model import DomainModel
    from lora_domains.serving.playground import AnswerFile, Tell

MEGABYTES = 50
"""Size of an uploaded file at most, unless --max-upload says otherwise."""


def add_verbs(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "playground", playground,
        usage="[ADAPTER ...] [options]",
        description="Open a page that puts base and adapters side by side on a text or a chat, "
        "with the probabilities of the labels and the words that mattered, and that answers the "
        "rows of a file. Only this machine reaches it, unless --host says otherwise, and it works "
        "without a network. Writes nothing: texts and files are gone when it stops (Ctrl-C).\n\n"
        "It needs Gradio: pip install 'lora-domains[playground]'.",
        example="lora-domains playground triage legal",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("adapters", nargs="*", metavar="ADAPTER", help="adapters on one base: "
                        "folders, or names in --out; default: all in --out")  # fmt: skip
    add_base_flags(inputs, sharded=False)
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--port", type=int, default=7860, metavar="N", help="default: %(default)s; 0 is a free one")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 for everyone in the "
        "network, who then needs no password; default: %(default)s")  # fmt: skip
    add("--max-upload", type=int, default=MEGABYTES, metavar="MB", help="the size of a file at "
        "most, in megabytes; default: %(default)s")  # fmt: skip
    add_quiet_flag(output)


def playground(flags: argparse.Namespace) -> int:
    """Serve the playground until it is interrupted."""
    from lora_domains.serving.network import LOOPBACK, listening, url

    check_installed("playground", "Gradio, which shows the page", "playground", ["gradio"])
    if flags.max_upload < 1:
        raise UsageError(
            where="--max-upload",
            expected="at least 1 (megabyte)",
            found=str(flags.max_upload),
            hint="Leave it out for 50.",
        )
    display = Display(brief=flags.quiet)
    folders = _folders(flags, display)
    check_bases("playground", folders, port=flags.port)
    with listening(flags.host, flags.port) as bound:
        model = open_model(flags, display=display, adapter=folders[0])
        from lora_domains.serving.playground import Playground

        loaded = {model.load_adapter(folder): folder for folder in folders}
        page = Playground(model, answering(model, loaded), flags.max_upload)
        display.line(f"Playground: {url(flags.host, bound)} (Ctrl-C stops it)")
        if flags.host not in LOOPBACK:
            display.warn("everyone who reaches this machine can use the adapters and upload files.")
        sys.stdout.flush()
        page.serve(bound, flags.host)
    return 0


def answering(model: "DomainModel", folders: Mapping[str, Path]) -> "AnswerFile":
    """How the playground answers a file: with ``predict`` and the adapters in ``folders``."""

    def answer(
        name: str, rows: Path, output: Path, options: Mapping[str, Any], tell: "Tell"
    ) -> str:
        given = {"adapter": str(folders[name]), "input": str(rows), "output": str(output)}
        asked = argparse.Namespace(**{**_predict_defaults(), **given, **options})
        notes = io.StringIO()
        predict_verb.predict(asked, _Told(notes, tell), model)
        return notes.getvalue().replace(f"{rows.parent}{os.sep}", "").strip()

    return answer


class _Told(Display):
    """A display that writes into a text, and tells how many rows of how many are answered."""

    def __init__(self, notes: io.StringIO, tell: "Tell") -> None:
        super().__init__(console=Console(file=notes, emoji=False, width=200))
        self._tell = tell

    @contextmanager
    def progress(self, what: str, total: int, *, epoch: float = 0) -> Iterator[Advance]:
        done = 0

        def advance(rows: int, /, *_notes: str, loss: float | None = None) -> None:
            nonlocal done
            done += rows
            self._tell(done, total)

        yield advance

    def pulse(self, text: str) -> None:
        """Nothing: the bar in the page shows it."""


def _folders(flags: argparse.Namespace, display: Display) -> list[Path]:
    """The folders of the adapters, all on one base: those in ``flags``, or all in --out.

    Raises AdapterError for a name that is not found, or where there are none, and UsageError for
    two adapters of one name.
    """
    out = Path(flags.out)
    if flags.adapters:
        return list(folders_by_name(flags.adapters, out).values())
    folders = folders_with(out, CARD)
    if not folders:
        find_adapter("an adapter", out)  # raises
    bases = {folder: Card.read(folder).base.identity for folder in folders}
    ours = [folder for folder in folders if bases[folder] == bases[folders[0]]]
    if others := [folder.name for folder in folders if folder not in ours]:
        display.line(f"On other bases, and not loaded: {listed(others)}. Name them to load them.")
    return ours


def _predict_defaults() -> dict[str, Any]:
    """The default of each flag of ``predict``."""
    parser = Parser()
    predict_verb.add_verbs(Verbs(parser))
    return vars(parser.parse_args(["predict", "ADAPTER"]))
