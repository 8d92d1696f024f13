"""Finance: is a headline bullish, bearish or neutral? Macro-F1, as the classes differ in size."""

from lora_domains import Classification, Data, Domain, Hub, run_recipe

domain = Domain(
    name="finance",
    task=Classification(prompt="headline: {text}\nsentiment:"),
    data=Data.embedded("finance"),
    show_text=True,  # the embedded rows are public
)


def tweets(split: str) -> Hub:
    """Twitter Financial News Sentiment (MIT): 9,543 rows; 2,388 validation rows are the test."""
    revision = "ccbe24de388e287beb92dd393a335c376b350ac3"
    return Hub("zeroshot/twitter-financial-news-sentiment", split=split, revision=revision)


hub = Domain(
    name="finance",
    task=Classification(wording={"0": "bearish", "1": "bullish", "2": "neutral"}),
    # Twelve test rows are also training rows.
    data=Data(tweets("train"), test=tweets("validation"), drop_leaks=True),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": hub})
