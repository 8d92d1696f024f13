"""Spam: precision matters most, as a lost message is worse than a spam message."""

from lora_domains import Classification, Data, Domain, Gates, Hub, run_recipe

domain = Domain(
    name="spam",
    task=Classification(positive="spam", prompt="sms: {text}\nlabel:"),
    data=Data.embedded("spam"),
    gates=Gates(precision=0.85, recall=0.80),
    show_text=True,  # the embedded rows are public
)

hub = Domain(
    name="spam",
    task=Classification(text="sms", positive="spam"),
    data=Data(
        # The UCI SMS Spam Collection (CC BY 4.0): 5,574 rows, split here.
        Hub(
            "ucirvine/sms_spam",
            split="train",
            revision="cae486f927c250fe1d4a5b55f11357964ed1646c",
        )
    ),
    gates=Gates(precision=0.85, recall=0.80),
)

if __name__ == "__main__":
    run_recipe({"embedded": domain, "hub": hub})
