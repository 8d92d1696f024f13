"""Legal: the title of a contract clause. Macro-F1, as there are many classes."""

from lora_domains import Classification, Data, Domain, Hub, run_recipe

domain = Domain(
    name="legal",
    task=Classification(prompt="clause: {text}\ntitle:"),
    data=Data.embedded("legal"),
    show_text=True,  # the embedded rows are public
)


def ledgar(split: str) -> Hub:
    """LEDGAR, 100 clause titles: 60,000 / 10,000 / 10,000 rows; use --limit for a sample."""
    revision = "c23fdff1a6bf74e0e1a71cb86f1e781d37da888c"
    return Hub("coastalcph/lex_glue", config="ledgar", split=split, revision=revision)


hub = Domain(
    name="legal",
    task=Classification(),
    data=Data(ledgar("train"), ledgar("validation"), ledgar("test")),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": hub})
