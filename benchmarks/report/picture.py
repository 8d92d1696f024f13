"""README's pictures: an adapter's card as `lora-domains show` prints it, and its report's page.

make medical && python benchmarks/report/picture.py adapters/medical

Writes .github/medical.svg and, where there is a Chromium (`make browser`), .github/report.png.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from lora_domains.cli.verbs.cards import show_card
from lora_domains.console import Display
from lora_domains.report.card import Card
from lora_domains.report.report import combine, save_report

ROOT = Path(__file__).parents[2]


def page_picture(folder: Path) -> None:
    """The top of the page that `lora-domains report` makes of ``folder``."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        sys.exit("No Chromium: .github/report.png stays as it was.")
    with tempfile.TemporaryDirectory() as scratch:
        save_report(combine([folder]), Path(scratch))
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--hide-scrollbars", "--window-size=1240,860",
             f"--user-data-dir={scratch}/profile", f"--screenshot={ROOT / '.github/report.png'}",
             Path(scratch, "report.html").as_uri()], check=True, capture_output=True,
        )  # fmt: skip


def main() -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(
            record=True, force_terminal=True, width=118, highlight=False, file=nowhere
        )
        show_card(Card.read(Path(sys.argv[1])), Display(console=console))
        picture = console.export_svg(title="lora-domains show medical")
        (ROOT / ".github" / "medical.svg").write_text(picture)
    page_picture(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
