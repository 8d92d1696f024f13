"""Predictions and models as Python and notebooks show them, without the text of a row."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from lora_domains.errors import check_installed
from lora_domains.report.card import Card
from lora_domains.report.terminal import Grid
from lora_domains.report.text import in_brief

if TYPE_CHECKING:
    import pandas

A = TypeVar("A")
SHOWN, LABELS = 20, 6
"""Answers that are shown, the others are counted; and labels whose probabilities are shown."""


class Predictions(list[A]):
    """The answers to some texts, in their order.

    ``row_index`` is the index of the pandas table or column that held the texts, if one did.
    """

    def __init__(self, answers: Iterable[A], index: Any = None) -> None:
        super().__init__(answers)
        self.row_index = index

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with the index of the texts, and the columns that ``lora-domains predict
        --output`` writes: ``table.join(predictions.to_frame())``.

        Raises UsageError where pandas is not installed.
        """
        check_installed("to_frame()", "the package pandas", "notebook", ["pandas"],
                        instead="use the answers, which are a list")  # fmt: skip
        import pandas

        return pandas.DataFrame([_cells(answer) for answer in self], index=self.row_index)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:SHOWN]))
        more = f", … {len(self) - SHOWN} more" if len(self) > SHOWN else ""
        return f"[{shown}{more}]"

    def _repr_html_(self) -> str:
        rows = [_cells(answer) for answer in self[:SHOWN]]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        chances = [name for name in columns if name.startswith("probability_")]
        if len(chances) > LABELS:
            columns = [name for name in columns if name not in chances]
        grid = Grid(["", *(name.removeprefix("probability_") for name in columns)])
        numbers = range(len(rows)) if self.row_index is None else self.row_index
        for number, row in zip(numbers, rows, strict=False):
            grid.add(str(number), *(_shown(row.get(name)) for name in columns))
        more = f"<p>… {len(self) - SHOWN:,} more</p>" if len(self) > SHOWN else ""
        return f"<div>{grid.html()}{more}</div>"


def _cells(answer: Any) -> Mapping[str, Any]:
    """The columns of a table that hold an answer."""
    cells: Mapping[str, Any] = getattr(answer, "cells", {"prediction": answer})
    return cells


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value)


def model_in_html(base: str, adapters: Mapping[str, Card | None]) -> str:
    """A model in a notebook: its ``base`` in words, and its loaded adapters by name."""
    grid = Grid(["adapter", "evaluation", "domain"])
    for name, card in adapters.items():
        words = "no card: saved by plain PEFT" if card is None else in_brief(card.adapter)
        grid.add(name, words, "" if card is None else card.adapter.domain)
    loaded = grid.html() if adapters else "<p>No adapter is loaded.</p>"
    return f"<div><p><b>{escape(base)}</b></p>{loaded}</div>"
