"""The verbs of ``lora-domains``, a file for each group, and where each of them is.

A verb's file is imported when the verb is used: the help and ``list`` would wait for the others.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """A verb, whose file adds it to a parser with ``add_verbs``."""

    file: str
    """Its module in ``cli``."""
    summary: str
    """Its line in the help."""


GROUPS = {
    "everyday": {
        "init": Verb("verbs.fit", "look at the rows of a file, and write a recipe for them"),
        "fit": Verb("verbs.fit", "train an adapter on the rows of a file, and evaluate it"),
        "evaluate": Verb(
            "verbs.evaluate", "judge a saved adapter on test rows, whoever trained it"
        ),
        "predict": Verb("verbs.predict", "label texts, or the rows of a file, with an adapter"),
        "list": Verb("verbs.cards", "list adapters with their verdicts"),
        "show": Verb("verbs.cards", "show an adapter's scores, gates and verdict"),
        "report": Verb("verbs.cards", "write one report of several adapters"),
    },
    "more": {
        "benchmark": Verb("verbs.evaluate", "measure what adapters gained and what they kept"),
        "compare": Verb("verbs.cards", "compare two adapters, or several seeds of one"),
        "rollback": Verb("verbs.cards", "restore an earlier version of an adapter"),
        "export": Verb(
            "verbs.export", "write an adapter for transformers, llama.cpp, Ollama or vLLM"
        ),
        "chat": Verb("verbs.serving", "talk to an adapter in the terminal"),
        "serve": Verb("verbs.serving", "serve adapters in the shapes of OpenAI's API"),
        "playground": Verb("playground", "compare base and adapters in the browser"),
        "push": Verb("verbs.push", "push an adapter to a repository on the Hub"),
        "doctor": Verb("verbs.cards", "show what this machine has for a run, and what is missing"),
    },
    "analysis": {
        "trace": Verb("verbs.analysis", "show how an adapter arrives at one answer"),
        "curve": Verb("verbs.analysis", "measure an adapter at several scales"),
        "learning-curve": Verb("verbs.analysis", "measure whether more training rows would help"),
        "cross-validate": Verb(
            "verbs.analysis", "estimate scores on few rows, before a test set is spent"
        ),
    },
}
"""By group and name, in the order of the help."""
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}
