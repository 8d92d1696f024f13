"""README's picture of the terminal: an adapter's card as `lora-domains show` prints it.

make medical && python benchmarks/picture.py adapters/medical    # writes .github/medical.svg
"""

import sys
from pathlib import Path

from rich.console import Console

from lora_domains.cli import show_card
from lora_domains.display import Display
from lora_domains.report import read_card

ROOT = Path(__file__).parents[1]


def main() -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(
            record=True, force_terminal=True, width=118, highlight=False, file=nowhere
        )
        show_card(read_card(Path(sys.argv[1])), Display(console=console))
        picture = console.export_svg(title="lora-domains show medical")
        (ROOT / ".github" / "medical.svg").write_text(picture)


if __name__ == "__main__":
    main()
