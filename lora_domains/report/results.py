"""What measuring gives: an adapter's card, or a report of several, to print and to save."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_domains.console import Display
from lora_domains.report.report import save_items, save_report
from lora_domains.report.text import outcome


@dataclass(frozen=True)
class Evaluation:
    """An adapter's card after it was measured; printing it shows the tables and the verdict."""

    card: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.card["adapters"][0]
        return entry

    @property
    def verdict(self) -> str:
        return str(self.entry["verdict"])

    def show(self, display: Display) -> None:
        display.scores(self.entry)
        display.general(self.entry)
        display.gates(self.entry)

    def __str__(self) -> str:
        text = io.StringIO()
        self.show(Display(console=Console(file=text, width=120)))
        return text.getvalue()


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measured: a report of several adapters, and the items it is made from."""

    report: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]

    @property
    def verdict(self) -> str:
        """The worst verdict among the adapters."""
        return outcome(self.report)

    def save(self, out: str | Path, junit: str | Path | None = None) -> Path:
        """Write the report and its views into the folder ``out``; returns it.

        Beside them ``measured/NAME`` holds each adapter's card and items of this run, from which
        ``lora-domains report`` makes the same report again. Raises UsageError when it cannot.
        """
        folder = Path(out)
        for entry in self.report["adapters"]:
            card = {key: self.report[key] for key in ("schema", "base", "environment")}
            card["adapters"] = [entry]
            save_items(folder / "measured" / entry["path"], card, self.items[entry["path"]])
        save_report(self.report, folder, Path(junit) if junit else None)
        return folder
