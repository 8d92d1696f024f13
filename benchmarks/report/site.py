"""What the pages in docs/ show: two tables of made-up rows, and a picture of the playground.

python benchmarks/report/site.py                     # docs/assets/visits.csv and new-visits.csv
lora-domains fit docs/assets/visits.csv --positive urgent --epochs 4 --evaluate
python benchmarks/report/site.py adapters/visits     # and docs/assets/playground.png

The picture needs Chromium (`make browser`) and the extras playground and test.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_domains.data.readers import read
from lora_domains.tasks import Row

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
COLUMNS = {
    "patient": "patient", "sex": "sex", "site": "site", "text": "note", "label": "priority",
}  # fmt: skip
"""Columns of the embedded rows, and their names in the tables."""
TRAINED, NEW = 1000, 20
"""Rows of the embedded test set that are in the first table, and in the second one."""
NOTE = (
    "Woman aged 68. Slurred speech and weakness of the left arm since this morning. Mother had "
    "black stools as a child."
)
PLACE = "http://127.0.0.1:7869"


def tables(folder: Path) -> None:
    """Write the two tables."""
    test = read("embedded:medical", "test")
    _write(folder / "visits.csv", [*read("embedded:medical", "train"), *test[:TRAINED]], COLUMNS)
    unlabelled = {name: shown for name, shown in COLUMNS.items() if name != "label"}
    _write(folder / "new-visits.csv", test[TRAINED : TRAINED + NEW], unlabelled)


def _write(path: Path, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns.values())
        table.writerows([row.values[name] for name in columns] for row in rows)


def playground(adapter: Path) -> None:
    """The page of `lora-domains playground` on ``NOTE``."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if chromium is None:
        sys.exit("No Chromium: docs/assets/playground.png stays as it was.")
    command = [sys.executable, "-m", "lora_domains.cli.main", "playground", str(adapter)]
    with subprocess.Popen([*command, "--port", PLACE.rpartition(":")[2]], text=True,
                          stdout=subprocess.PIPE) as server:  # fmt: skip
        assert server.stdout is not None
        next(line for line in server.stdout if PLACE in line)
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 860})
            page.goto(PLACE)
            page.get_by_label("Text", exact=True).fill(NOTE)
            page.get_by_role("button", name="Compare").click()
            page.wait_for_selector(".ld-panel")
            page.wait_for_timeout(1000)
            page.screenshot(path=ASSETS / "playground.png")
            browser.close()
        server.terminate()


if __name__ == "__main__":
    tables(ASSETS)
    if len(sys.argv) > 1:
        playground(Path(sys.argv[1]))
