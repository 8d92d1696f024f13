"""The ``lora-domains`` command: its verbs, and the exit code."""

import sys
from collections.abc import Sequence

from lora_domains import __version__
from lora_domains.cli.analysis_commands import add_analysis_commands
from lora_domains.cli.card_commands import add_card_commands
from lora_domains.cli.commands import add_commands, add_doctor
from lora_domains.cli.evaluate import add_evaluate
from lora_domains.cli.parser import Parser, guarded, wrapped

ABOUT = (
    "One LoRA adapter per domain on one frozen base, and a measured verdict on what each adapter "
    "gained and what it kept."
)
EXIT_CODES = (
    "Exit codes of verbs that end in a verdict: 0 pass, 1 fail, 2 error, 3 inconclusive, 130 "
    "interrupted; of the others: 0, 2 or 130.\n\nlora-domains VERB --help describes a verb."
)


def make_parser() -> Parser:
    """The parser of ``lora-domains`` with every verb."""
    parser = Parser(
        prog="lora-domains",
        usage="lora-domains VERB [options]",
        description=wrapped(ABOUT),
        epilog=wrapped(EXIT_CODES),
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", title="verbs", required=True, prog="lora-domains"
    )
    add_commands(verbs)
    add_evaluate(verbs)
    add_card_commands(verbs)
    add_analysis_commands(verbs)
    add_doctor(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lora-domains ARGUMENTS`` and exit."""

    def run() -> int:
        flags = make_parser().read(arguments)
        code: int = flags.run(flags)
        return code

    sys.exit(guarded(run))


if __name__ == "__main__":
    main()
