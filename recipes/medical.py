"""Medical: triage of notes. Recall matters most: a missed emergency is worse than an alarm."""

from collections.abc import Mapping
from typing import Any

from lora_domains import Classification, Data, Domain, Gates, Hub, Training, run_recipe

domain = Domain(
    name="medical",
    task=Classification(positive="urgent", prompt="note: {text}\ntriage:"),
    data=Data.embedded("medical"),
    training=Training(epochs=5),
    gates=Gates(recall=0.80, precision=0.85),
    show_text=True,  # the embedded rows are public
)


def abstract(row: Mapping[str, Any]) -> dict[str, Any]:
    """PubMedQA holds the sentences of an abstract in a list."""
    return {**row, "context": " ".join(row["context"]["contexts"])}


pubmedqa = Domain(
    name="medical",
    task=Classification(text=("context", "question"), label="final_decision"),
    data=Data(
        Hub(
            "qiaojin/PubMedQA",
            config="pqa_labeled",
            split="train",
            revision="9001f2853fb87cab8d220904e0de81ac6973b318",
        ),
        row=abstract,
    ),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": pubmedqa})
