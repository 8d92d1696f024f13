"""The sentences of reports."""

from lora_domains.report.card import AdapterEntry
from lora_domains.report.text import how_scored, precision_elsewhere
from lora_domains.tasks import Classification, Generation, task_record


def test_the_unit_of_the_loss_is_shown() -> None:
    def entry(judged: str, head: bool) -> AdapterEntry:
        return AdapterEntry(
            domain="x", path="x", sha256=None, judged={"loss": judged},
            settings={"task": task_record(Classification(head=head))},
        )  # fmt: skip

    assert how_scored(entry("label cross-entropy", False)) == (
        "The loss is label cross-entropy; in the table of epochs it is nats per answer token."
    )
    same = "The loss is label cross-entropy, here and in the table of epochs."
    assert how_scored(entry("label cross-entropy", True)) == same


def test_how_answers_were_made_is_shown() -> None:
    made = AdapterEntry(
        domain="x", path="x", sha256=None, settings={"task": task_record(Generation())},
        domain_scores={"token_f1": {"n": 1200}, "number_match": {"n": 1100}},
        judged={
            "loss": "nats per answer token",
            "decoding": {"method": "greedy", "max_new_tokens": 64, "stop": ["<|im_end|>", "</s>"]},
            "judge": {"command": "python judge.py", "sha256": "0", "low": 1.0, "high": 10.0},
        },
    )  # fmt: skip
    assert how_scored(made) == (
        "The loss is nats per answer token, here and in the table of epochs. Number match is on "
        "1,100 of the rows. Answers are greedy, of 64 tokens at most, and end at "
        "<|im_end|> or </s>. The judge is python judge.py (here 1 to 10 is 0 to 1)."
    )
    made.judged["judge"] |= {"low": 0.0, "high": 1.0}
    assert how_scored(made).endswith("The judge is python judge.py.")
    made.trained_elsewhere = True  # no epoch is known
    assert how_scored(made).startswith("The loss is nats per answer token. Number match")


def test_precision_elsewhere_is_said_at_the_declared_share_or_at_usual_ones() -> None:
    points = [{"prevalence": share, "precision": p, "lower": p - 0.1, "upper": p + 0.1}
              for share, p in ((0.01, 0.2), (0.05, 0.58), (0.1, 0.7), (0.4, 0.85))]  # fmt: skip
    curve = {"positive": "urgent", "prevalence": {"test": 0.4, "declared": 0.05, "points": points}}
    here = "precision is 0.850 where 40 % of the rows are urgent, as in the test rows"
    rare = "0.580 (0.480 to 0.680) where 5 % are"
    assert precision_elsewhere(curve) == f"{here}; it would be {rare}"
    curve["prevalence"]["declared"] = None  # type: ignore[index]
    assert precision_elsewhere(curve) == (
        f"{here}; it would be 0.700 (0.600 to 0.800) where 10 % are, {rare}, "
        "0.200 (0.100 to 0.300) where 1 % are"
    )
    for point in points:  # nothing is predicted positive
        point["precision"] = None  # type: ignore[assignment]
    assert precision_elsewhere(curve) == ""
    assert precision_elsewhere({"positive": "urgent"}) == ""
