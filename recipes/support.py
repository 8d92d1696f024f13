"""Support: what does a customer want? Macro-F1, as there are many intents."""

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
    # Some test rows are also training rows.
    data=Data(banking77("train"), test=banking77("test"), drop_leaks=True),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": hub})
