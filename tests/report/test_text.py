"""The sentences of reports."""

from lora_domains.report.card import AdapterEntry
from lora_domains.report.text import losses
from lora_domains.tasks import Classification, task_record


def test_the_unit_of_the_loss_is_shown() -> None:
    def entry(judged: str, head: bool) -> AdapterEntry:
        return AdapterEntry(
            domain="x", path="x", sha256=None, judged={"loss": judged},
            settings={"task": task_record(Classification(head=head))},
        )  # fmt: skip

    assert losses(entry("label cross-entropy", False)) == (
        "The loss is label cross-entropy; in the table of epochs it is nats per answer token."
    )
    same = "The loss is label cross-entropy, here and in the table of epochs."
    assert losses(entry("label cross-entropy", True)) == same
