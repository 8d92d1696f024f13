"""Support: what does a customer want? Many intents, so that each counts alike (macro-F1)."""

from lora_domains import Classification, Data, Domain, Hub, run_recipe

domain = Domain(
    name="support",
    task=Classification(prompt="message: {text}\nintent:"),
    data=Data.embedded("support"),
    show_text=True,  # the embedded rows are public
)


def banking77(split: str) -> Hub:
    """BANKING77 (CC BY 4.0): 77 intents of bank customers."""
    revision = "0fd18e25b25c072e09e0d92ab615fda904d66300"
    return Hub("mteb/banking77", split=split, revision=revision)


hub = Domain(
    name="support",
    task=Classification(label="label_text"),
    # Some of its test rows are training rows too.
    data=Data(banking77("train"), test=banking77("test"), drop_leaks=True),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": hub})
