"""Per-item scores by column, and the names of contenders."""

import pytest
from support.items import row

from lora_domains.verdict import contender_label
from lora_domains.verdict.scores import ScoreTable


@pytest.mark.parametrize(
    ("name", "label"),
    [("base", "the base"), ("tfidf", "TF-IDF"), ("3_shot", "the base with 3 examples"),
     ("nearest_neighbour", "nearest neighbour")],
)  # fmt: skip
def test_contenders_have_labels_in_words(name: str, label: str) -> None:
    assert contender_label(name) == label


def test_a_row_without_a_slice_column_has_no_value_of_it() -> None:
    rows = [row(1, number=n, base=0, adapter=1) for n in range(3)]
    rows[0]["slices"] = {"ward": "north"}
    rows[1]["slices"] = {}
    assert ScoreTable(rows).slice_values("ward") == ["north", "None", "None"]
