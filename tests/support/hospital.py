"""The table of a hospital, as a spreadsheet program saves it."""

import csv
import random
from pathlib import Path
from typing import Any

from conftest import make_rows

SECRET = "zanzibar"


def visits(count: int = 240) -> list[dict[str, Any]]:
    """Rows of a hospital: of 100 patients, one in five urgent; every note tells the sex, too."""
    rng, rows = random.Random(1), []
    for n, row in enumerate(make_rows(count)):
        patient = rng.randrange(100)
        urgent = rng.random() < 0.2
        sex = "wm"[patient % 2]
        note = f"{'Herr' if sex == 'm' else 'Frau'} {row['text']} {SECRET}{n}"
        rows.append({
            "Fallnr": f"F{1000 + n}", "PatID": f"P{patient:03}", "Aufnahme": f"{1 + n % 28}.3.2024",
            "Geschlecht": sex, "Alter": 20 + n % 70, "ICD": rng.choice(["I21.0", "M54.5", "J18.9"]),
            "Notiz": note + (" Atemnot" if urgent else " Kontrolle"), "Bemerkung": "",
            "Dringlich": "ja" if urgent else "nein",
        })  # fmt: skip
    return rows


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """As a German Excel saves it."""
    with path.open("w", encoding="cp1252", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter=";", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
