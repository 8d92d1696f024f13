"""Markdown views: within their limits, and nothing in a name is markup."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_domains.report.card import Report
from lora_domains.report.markdown import COMMENT, escaped, summary, table
from lora_domains.report.report import combine


def many(report: Report, count: int) -> Report:
    entries = [replace(report.adapters[n % 3], path=f"adapter-{n}") for n in range(count)]
    return replace(report, adapters=entries)


@pytest.mark.parametrize(("count", "limit"), [(3, COMMENT), (60, COMMENT), (2000, COMMENT),
                                              (700, 1024 * 1024), (3, 800)])  # fmt: skip
def test_markdown_keeps_its_limit_and_counts_what_is_left_out(
    three: list[Path], count: int, limit: int
) -> None:
    text = summary(many(combine(three), count), limit)
    assert len(text.encode()) <= limit
    assert text.count("<details") == text.count("</details>")
    shown = len(re.findall(r"<summary>", text))
    left_out = re.search(r"(\d+) more adapters in detail", text)
    assert shown + (int(left_out[1]) if left_out else 0) == count
    if count == 3 and limit == COMMENT:
        assert shown == 3
    # Those that fail come first, whatever is left out.
    if "| adapter-" in text:
        assert "✘ fail" in text.split("| adapter-", 1)[1].splitlines()[0]


MARKS = ["<b>", "</b>", "<script>", "<!--", "|", "*x*", "_x_", "[a](b)", "![a](b)", "`c`", "\\",
         "http://a.b", "@team", "# x", "~~s~~", "&lt;", "$x$", "\n\n", "- ", " x "]  # fmt: skip


@given(st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=6).map("".join))
def test_a_name_is_never_markdown_or_html(name: str) -> None:
    text = "\n".join(table(["a", "b"], [["x", escaped(name)], ["y", "z"]]))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    cells = [t for t in tokens if t.type == "inline"]
    assert len(cells) == 6
    inside = cells[3].children or []
    assert {child.type for child in inside} <= {"text", "text_special"}
    # The text is unchanged, except for what prevents links and mentions.
    shown = "".join(child.content for child in inside).replace("\u200b", "")
    assert shown == " ".join(name.replace("\0", "\ufffd").split()).replace("\u200b", "")
