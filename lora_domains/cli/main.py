"""The ``lora-domains`` command: its verbs, and the exit code."""

import sys
from collections.abc import Sequence

from lora_domains import __version__
from lora_domains.cli.parser import Parser, Verbs, guarded, wrapped
from lora_domains.cli.playground import add_playground
from lora_domains.cli.verbs.analysis import add_analysis_verbs
from lora_domains.cli.verbs.cards import add_card_verbs, add_doctor
from lora_domains.cli.verbs.evaluate import add_benchmark, add_evaluate
from lora_domains.cli.verbs.export import add_export
from lora_domains.cli.verbs.fit import add_fit, add_init
from lora_domains.cli.verbs.predict import add_predict
from lora_domains.cli.verbs.push import add_push
from lora_domains.cli.verbs.serving import add_serving_verbs

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
    parser = Parser(prog="lora-domains", usage="lora-domains VERB [options]")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = Verbs(parser)
    # In each group, the help lists them in this order.
    add_init(verbs)
    add_fit(verbs)
    add_evaluate(verbs)
    add_predict(verbs)
    add_benchmark(verbs)
    add_card_verbs(verbs)
    add_export(verbs)
    add_serving_verbs(verbs)
    add_playground(verbs)
    add_push(verbs)
    add_doctor(verbs)
    add_analysis_verbs(verbs)
    parser.description = f"{wrapped(ABOUT)}\n\n{verbs.help()}"
    parser.epilog = wrapped(EXIT_CODES)
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
