"""The ``lora-domains`` command: its verbs, and the exit code."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lora_domains.cli.parser import Parser, Verbs, guarded, wrapped
from lora_domains.cli.verbs import GROUPS, VERBS
from lora_domains.errors import in_lines

ABOUT = (
    "One LoRA adapter per domain on one frozen base, and a measured verdict on what each adapter "
    "gained and what it kept."
)
EXIT_CODES = (
    "Exit codes of verbs that end in a verdict: 0 pass, 1 fail, 2 error, 3 inconclusive, 130 "
    "interrupted; of the others: 0, 2 or 130.\n\nlora-domains VERB --help describes a verb."
)


class Version(argparse.Action):
    """Prints the version, which takes time to find."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, help="show the version and exit",
                         **options)  # fmt: skip

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from lora_domains import __version__

        parser.exit(message=f"{__version__}\n")


def make_parser(words: Sequence[str] = tuple(VERBS)) -> Parser:
    """The parser of ``lora-domains``. Of verbs that are not among ``words`` it knows the names."""
    parser = Parser(prog="lora-domains", usage="lora-domains VERB [options]")
    parser.add_argument("--version", action=Version)
    verbs = Verbs(parser)
    for file in dict.fromkeys(verb.file for name, verb in VERBS.items() if name in words):
        import_module(f"lora_domains.cli.{file}").add_verbs(verbs)
    verbs.add_names(VERBS)
    parser.description = f"{wrapped(ABOUT)}\n\n{_verbs()}"
    parser.epilog = wrapped(EXIT_CODES)
    return parser


def _verbs() -> str:
    """The verbs of each group with their summaries, for a terminal of 80 columns."""
    width = max(map(len, VERBS)) + 4
    lines = []
    for group, verbs in GROUPS.items():
        lines.append(f"{group}:")
        for name, verb in verbs.items():
            summary = f"\n{'':{width}}".join(in_lines(verb.summary, 79 - width))
            lines.append(f"  {name}".ljust(width) + summary)
        lines.append("")
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lora-domains ARGUMENTS`` and exit."""

    def run() -> int:
        words = sys.argv[1:] if arguments is None else arguments
        flags = make_parser(words).read(words)
        code: int = flags.run(flags)
        return code

    sys.exit(guarded(run))


if __name__ == "__main__":
    main()
