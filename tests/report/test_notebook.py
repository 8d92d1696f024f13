"""How cards, evaluations and reports look in Python and in a notebook."""

from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.folders import SECRET

from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.report.html import INKS
from lora_domains.report.report import Benchmark, Evaluation, combine, rebuild


class Tags(HTMLParser):
    """The tags of a page, each closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("br", "progress"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == "progress" or self.open.pop() == tag


def test_a_card_in_python_and_in_a_notebook(three: list[Path]) -> None:
    card = rebuild(three[0])
    fields = card.adapter.domain_scores["f1"]
    figures = f"F1 {fields['base']:.3f} → {fields['adapter']:.3f}"
    assert repr(card) == f"<Card medical on {card.base.id}: pass, {figures}>"
    assert repr(card.adapter) == "<AdapterEntry medical: pass>"
    evaluation = Evaluation(card)
    assert repr(evaluation) == f"<Evaluation medical on {card.base.id}: pass, {figures}>"
    page = evaluation._repr_html_()
    tags = Tags(page)
    assert not tags.open
    assert {"table", "details", "summary"} <= tags.seen
    assert f"{fields['adapter']:.3f}" in page
    assert all(gate["why"] in unescape(page) for gate in card.adapter.gates)


def test_a_card_without_an_evaluation_says_so() -> None:
    base = BaseRecord("tiny", None, "0", "float32", None)
    entry = AdapterEntry(domain="triage", path="triage", sha256=None)
    entry.training = {"epochs": 3, "best_epoch": 2}
    card = Card(base=base, adapter=entry)
    assert repr(card) == "<Card triage on tiny: not evaluated>"
    assert "Not evaluated: 3 epochs, epoch 2 kept." in card._repr_html_()


def test_a_report_in_python_and_in_a_notebook(three: list[Path]) -> None:
    benchmark = Benchmark(combine(three), {})
    assert repr(benchmark).startswith("<Benchmark of medical, legal, finance on ")
    assert "Do not ship" in str(benchmark)
    page = benchmark._repr_html_()
    assert not Tags(page).open
    assert all(f">{name}<" in page for name in ("medical", "legal", "finance"))
    assert all(outcome in page for outcome in INKS)


def test_no_text_of_a_row_is_shown_and_names_are_escaped(three: list[Path]) -> None:
    combined = combine(three)
    for entry in combined.adapters:
        entry.path = "<b>bold</b>"
    card = Card(base=combined.base, adapter=combined.adapters[0])
    for page in (card._repr_html_(), Benchmark(combined, {})._repr_html_()):
        assert "<b>bold" not in page
        assert "&lt;b&gt;bold&lt;/b&gt;" in page
        assert SECRET not in page
    assert SECRET not in repr(combined)


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_verdicts_are_readable_on_a_light_and_on_a_dark_page(page: str) -> None:
    def luminance(colour: str) -> float:
        shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for ink in INKS.values():
        dark, light = sorted((luminance(ink), luminance(page)))
        assert (light + 0.05) / (dark + 0.05) >= 4
