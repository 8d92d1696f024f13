"""The field's standard probes, each from the Hub at a pinned revision, or from a local file.

A local file of the same shape replaces the Hub: ``mmlu("mmlu_test.jsonl")``, or ``mmlu.jsonl`` in
the folder that ``LORA_DOMAINS_SUITES`` names. Answers are scored as continuations, most of them
without examples in the prompt: retention compares an adapter with its base on the same items and
does not compete on a leaderboard.
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_domains.data.readers import read
from lora_domains.data.source import Hub, Source
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Generation, MultipleChoice

Values = Mapping[str, Any]
ANSWER = "Question: {question}\nAnswer:"
WINDOWS = 200
"""The most texts of WikiText on which drift and nats are measured."""
LONG = 200
"""The fewest characters of a paragraph; shorter lines are titles."""
FOLDER = "LORA_DOMAINS_SUITES"
"""The variable that names a folder of local files: ``mmlu.jsonl``, ``gsm8k_train.jsonl``,
``wikitext.txt`` and so on."""
KINDS = ("jsonl", "json", "csv", "parquet", "txt")
PATIENCE = 3.0
"""Seconds in which the Hub answers, or is not there."""


def mmlu(rows: Source | None = None) -> Probe:
    """MMLU: 57 subjects, four choices (Hendrycks et al. 2021, arXiv 2009.03300)."""
    hub = Hub("cais/mmlu", "test", "c30699e8356da336a370243923dbaf21066bb9fe", "all")
    return Probe("mmlu", MultipleChoice(prompt=ANSWER), rows or hub, part="subject")


def arc(rows: Source | None = None) -> Probe:
    """ARC-Challenge: school science (Clark et al. 2018, arXiv 1803.05457)."""
    hub = Hub(
        "allenai/ai2_arc", "test", "210d026faf9955653af8916fad021475a3f00453", "ARC-Challenge"
    )
    return Probe("arc", MultipleChoice(prompt=ANSWER, per_token=True), rows or hub, lettered)


def openbookqa(rows: Source | None = None) -> Probe:
    """OpenBookQA: elementary science (Mihaylov et al. 2018, arXiv 1809.02789)."""
    hub = Hub("allenai/openbookqa", "test", "388097ea7776314e93a529163e0fea805b8a6454", "main")
    return Probe("openbookqa", MultipleChoice(prompt="{question}", per_token=True), rows or hub,
                 lettered)  # fmt: skip


def hellaswag(rows: Source | None = None) -> Probe:
    """HellaSwag: which ending follows (Zellers et al. 2019, arXiv 1905.07830)."""
    hub = Hub("Rowan/hellaswag", "validation", "218ec52e09a7e7462a5400043bb9a69a41d06b76")

    def plain(text: str) -> str:
        # As in EleutherAI's harness, without WikiHow's marks.
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ").strip()

    def reads(row: Values) -> Values:
        question = plain(f"{row['activity_label']}: {row['ctx']}")
        return {"question": question, "choices": [plain(e) for e in row["endings"]],
                "answer": str(row["label"])}  # fmt: skip

    task = MultipleChoice(prompt="{question}", per_token=True)
    return Probe("hellaswag", task, rows or hub, reads)


def winogrande(rows: Source | None = None) -> Probe:
    """WinoGrande: which noun a pronoun refers to (Sakaguchi et al. 2020, arXiv 1907.10641).

    A choice is the noun with the rest of its sentence, so that whole sentences are compared.
    """
    revision = "01e74176c63542e6b0bcb004dcdea22d94fb67b5"
    hub = Hub("allenai/winogrande", "validation", revision, "winogrande_xl")

    def reads(row: Values) -> Values:
        before, _, after = row["sentence"].partition("_")
        choices = [f"{row[name]}{after}" for name in ("option1", "option2")]
        return {"question": before.strip(), "choices": choices, "answer": int(row["answer"]) - 1}

    return Probe("winogrande", MultipleChoice(prompt="{question}"), rows or hub, reads)


def truthfulqa(rows: Source | None = None) -> Probe:
    """TruthfulQA, single true answer (MC1; Lin et al. 2022, arXiv 2109.07958)."""
    revision = "741b8276f2d1982aa3d5b832d3ee81ed3b896490"
    hub = Hub("truthfulqa/truthful_qa", "validation", revision, "multiple_choice")

    def reads(row: Values) -> Values:
        targets = row["mc1_targets"]
        answer = list(targets["labels"]).index(1)
        return {"question": row["question"], "choices": targets["choices"], "answer": answer}

    return Probe("truthfulqa", MultipleChoice(prompt="Q: {question}\nA:"), rows or hub, reads)


def gsm8k(rows: Source | None = None, shown: Source | None = None) -> Probe:
    """GSM8K: word problems, scored by the last number (Cobbe et al. 2021, arXiv 2110.14168).

    Answers are generated, after four worked examples of its training split.
    """
    revision = "e53f048856ff4f594e959d75785d2c2d37b678ee"
    hub, train = (Hub("openai/gsm8k", split, revision, "main") for split in ("test", "train"))
    task = Generation(prompt=ANSWER, max_new_tokens=256, judge="number", until="\n\n")

    def reads(row: Values) -> Values:
        # <<48/2=24>> are annotations for a calculator.
        return {**row, "answer": re.sub(r"<<.*?>>", "", row["answer"])}

    return Probe("gsm8k", task, rows or hub, reads, shown=shown or train, shots=4)


def lettered(row: Values) -> Values:
    """The columns question, choices and answer from ARC's and OpenBookQA's lettered choices."""
    choices = row["choices"]
    if not isinstance(choices, Mapping) or "text" not in choices:
        return row
    answer = list(choices["label"]).index(row["answerKey"])
    question = row.get("question") or row["question_stem"]
    return {"question": question, "choices": list(choices["text"]), "answer": answer}


def wikitext(rows: Source | None = None, split: str = "test") -> list[str]:
    """Paragraphs of WikiText-2 (Merity et al. 2017, arXiv 1609.07843), from the Hub or a file."""
    source = rows or local("wikitext") or _wikitext(split)
    return paragraphs(str(row.values["text"]) for row in read(source, split))


def _wikitext(split: str) -> Hub:
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    return Hub("Salesforce/wikitext", split, revision, "wikitext-2-raw-v1")


def paragraphs(lines: Iterable[str], most: int = WINDOWS) -> list[str]:
    """The first ``most`` lines that are paragraphs, not titles."""
    whole = (line.strip() for line in lines)
    return [line for line in whole if len(line) >= LONG][:most]


def standard() -> Suite:
    """Seven probes and WikiText, all from the Hub; use ``limit`` to score it in minutes."""
    return _suite("standard", PROBES.values())


def _suite(name: str, probes: Iterable[Callable[[], Probe]]) -> Suite:
    return Suite(name, tuple(_localised(probe()) for probe in probes), _text_at_hand, tokens=250)


def _text_at_hand() -> list[str]:
    """WikiText where it can be had, else the embedded general text."""
    here = _is_here(local("wikitext") or _wikitext("test")) or _hub_answers()
    return wikitext() if here else list(embedded_texts("test"))


# ── What is at hand ─────────────────────────────────────────────────────────────────────────────


def local(name: str) -> str | None:
    """The local file of rows of this name; None where there is none."""
    folder = os.environ.get(FOLDER)
    paths = [Path(folder) / f"{name}.{kind}" for kind in KINDS] if folder else []
    return next((str(path) for path in paths if path.is_file()), None)


def _localised(probe: Probe) -> Probe:
    """``probe`` with the rows of its local files, where there are such files."""
    rows, shown = local(probe.name), local(f"{probe.name}_train")
    return replace(probe, rows=rows or probe.rows, shown=shown or probe.shown)


def at_hand() -> Suite | None:
    """The standard suite where the Hub answers; else those of its probes that are on this machine,
    and None where none are."""
    suite = standard()
    if _hub_answers():
        return suite
    probes = tuple(probe for probe in suite.probes if _is_here(probe.rows, probe.shown))
    return replace(suite, probes=probes) if probes else None


def to_be_had() -> Suite:
    """``at_hand``; the whole standard suite, whose error says what is missing, where nothing is."""
    return at_hand() or standard()


def _is_here(*sources: Any) -> bool:
    """Whether all ``sources`` are local files, or data sets in the cache of ``datasets``."""
    from huggingface_hub.constants import HF_HOME

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    cached = {path.name.casefold() for path in cache.glob("*___*")}
    hubs = [source.id for source in sources if isinstance(source, Hub)]
    return all(name.replace("/", "___").casefold() in cached for name in hubs)


@cache
def _hub_answers() -> bool:
    """Whether the Hub can be reached, and may be."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), PATIENCE).close()
    except OSError:
        return False
    return True


PROBES: dict[str, Callable[[], Probe]] = {
    "mmlu": mmlu,
    "arc": arc,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "openbookqa": openbookqa,
    "truthfulqa": truthfulqa,
    "gsm8k": gsm8k,
}
SINGLE: dict[str, Callable[[], Suite]] = {
    name: partial(_suite, name, [probe]) for name, probe in PROBES.items()
}
"""A suite for each probe."""
