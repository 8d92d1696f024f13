"""Items of rows that are not independent."""

from support.items import table

from lora_domains.evaluation.items import groups_of, make_items
from lora_domains.tasks import Example
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable


def rows(*texts: tuple[str, str | None]) -> list[EncodedRow]:
    """A row for each (text, group)."""
    made = []
    for number, (text, group) in enumerate(texts):
        row = Example(f"test:{number}", text, "yes", ("no", "yes"), 1, group=group)
        made.append(EncodedRow(row, EncodedExample(row.id, (1,), (2,), ((2,), (3,)), 1)))
    return made


def test_repeated_rows_are_one_group() -> None:
    texts = rows(("Call me!", None), ("hello", None), ("call me", None), ("bye", None))
    assert groups_of(texts) == ["test:0", None, "test:0", None]
    stored = make_items("test", texts, {}, b"key")
    assert stored[0]["group"] == stored[2]["group"]
    assert "group" not in stored[1]


def test_groups_that_share_a_text_are_one() -> None:
    texts = rows(("a", "ann"), ("b", "ann"), ("b", "ben"), ("c", "ben"), ("d", "cleo"), ("a", None))
    assert groups_of(texts) == ["ann"] * 4 + ["cleo", "ann"]


def test_a_repeated_row_is_no_further_evidence() -> None:
    once = table(40, 10, 5, 45)
    fourfold = [item | {"group": f"row {n}"} for n, item in enumerate(once) for _ in range(4)]
    independent = [item for item in once for _ in range(4)]

    def width(items: list[dict[str, object]]) -> float:
        bounds = METRICS["accuracy"].bounds(ScoreTable(items), "adapter")
        return bounds.upper - bounds.lower

    assert width(fourfold) > 0.95 * width(once) > 1.5 * width(independent)
