"""Medical: triage of clinical notes. Recall first: a missed emergency costs more than an alarm."""

from lora_domains import Classification, Data, Domain, Gates, run_recipe

domain = Domain(
    name="medical",
    task=Classification(positive="urgent", prompt="note: {text}\ntriage:"),
    data=Data.embedded("medical"),
    gates=Gates(recall=0.80, precision=0.85),
    show_text=True,  # the embedded rows are public
)

if __name__ == "__main__":
    run_recipe({"embedded": domain})
