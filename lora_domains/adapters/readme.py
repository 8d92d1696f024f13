"""The README of an adapter folder, which is its model card on the Hub."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_domains.errors import DataError, UsageError, number_of
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.report.html import ASSETS
from lora_domains.report.markdown import conclusion_of, escaped, measured
from lora_domains.report.text import chosen_among, metric_name
from lora_domains.tasks import Task

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def readme(card: Card) -> str:
    """The README of an adapter folder: front matter for the Hub, verdict first, how to load it."""
    entry, base = card.adapter, card.base
    body = [
        f"# {entry.domain}",
        "",
        *conclusion_of(entry),
        f"A LoRA adapter for `{base.id}`, {_origin(entry)} by lora_domains. {_licence(base)}",
        *_scale(entry),
        "",
    ]
    body += measured(entry) + _training(entry) + _loading(entry, base)
    return "\n".join(["---", _metadata(card), "---", "", *body]).rstrip() + "\n"


def _metadata(card: Card) -> str:
    """The front matter that the Hub reads, as YAML: base, tags and scores.

    No licence: whose rows an adapter was trained on decides that. A base in a folder has no id.
    """
    from huggingface_hub import ModelCardData

    entry, base = card.adapter, card.base
    task = "text-classification" if _headed(entry) else "text-generation"
    data = ModelCardData(
        base_model=base.id if base.revision else None, library_name="peft", pipeline_tag=task,
        tags=["lora", "lora_domains", entry.domain], model_name=entry.path,
        eval_results=[*_results(entry)] or None,
    )  # fmt: skip
    return data.to_yaml().rstrip()


ON_HUB = {
    "macro_f1": ("f1", "macro"), "label_macro_f1": ("f1", "macro"), "micro_f1": ("f1", "micro"),
    "macro_precision": ("precision", "macro"), "micro_precision": ("precision", "micro"),
    "micro_recall": ("recall", "micro"), "mcc": ("matthews_correlation", None),
    "rouge_l": ("rouge", None), "spearman": ("spearmanr", None),
}  # fmt: skip
"""The Hub's names of metrics, and how they are averaged; others have the same name there."""


def _results(entry: AdapterEntry) -> Iterator["EvalResult"]:
    """The scores on test rows, as ``model-index`` holds them."""
    from huggingface_hub import EvalResult

    task, source = entry.declared_task, entry.settings.get("data", {}).get("test")
    kind = "text-classification" if task and task.has_labels else "text-generation"
    name = f"{entry.domain} test rows"
    dataset: dict[str, Any] = {"dataset_type": entry.domain, "dataset_name": name}
    if isinstance(source, Mapping):  # a data set on the Hub
        dataset = {"dataset_type": source["id"], "dataset_name": source["id"],
                   "dataset_config": source.get("config"), "dataset_split": source["split"],
                   "dataset_revision": source["revision"]}  # fmt: skip
    for metric, fields in entry.domain_scores.items():
        if math.isfinite(fields["adapter"]):
            known, average = ON_HUB.get(metric, (metric, None))
            yield EvalResult(
                task_type=kind, metric_type=known, metric_value=round(fields["adapter"], 4),
                metric_name=metric_name(metric), **dataset,
                metric_args={"average": average} if average else None,
            )  # fmt: skip


def _scale(entry: AdapterEntry) -> list[str]:
    """That ``lora_alpha`` holds another scale than that of the training, where it does."""
    if entry.scale == 1:
        return []
    scaled = f"Its effect is {entry.scale:g} times the trained one (`lora_alpha`)"
    return ["", f"{scaled}, a scale chosen on validation rows."]


def _licence(base: BaseRecord) -> str:
    """Whose licences there are: the base's own, where it is known, and that of the adapter."""
    known = f"The base has the licence {escaped(base.licence)}. " if base.licence else ""
    return f"{known}The licence of the adapter is its owner's to state."


def _origin(entry: AdapterEntry) -> str:
    return "trained elsewhere and measured" if entry.trained_elsewhere else "trained and measured"


TEMPLATES = {
    "own": "The base's own chat template renders the prompts (`tokenizer.apply_chat_template`).",
    "plain": "The base has no chat template. A plain one renders the prompts: `User: …`, a line "
    "for each turn, and `Assistant:` before the answer.",
}


def _training(entry: AdapterEntry) -> list[str]:
    training, ledger, leaks = entry.training, entry.ledger, entry.leaks
    if entry.trained_elsewhere:
        return []
    decayed = f", decayed from {training['decayed_from']}" if "decayed_from" in training else ""
    return [
        "## Training",
        "",
        f"{number_of(training['epochs'], 'epoch')}, {number_of(training['steps'], 'step')}, "
        f"{training['seconds']:.0f} s; "
        f"best epoch {training['best_epoch']}{decayed}. {number_of(ledger['read'], 'row')} read, "
        f"{ledger['refused']} refused, {ledger['duplicates']} duplicates, "
        f"{ledger['truncated']} truncated, {ledger['supervised_tokens']} supervised tokens. "
        f"Leaks: {leaks['exact']} exact, {leaks['near']} near.",
        "",
        *([f"{chosen}.", ""] if (chosen := chosen_among(training)) else []),
        *([_rendered(entry.chat), ""] if entry.chat else []),
    ]


def _rendered(chat: Mapping[str, str]) -> str:
    """What renders the prompts."""
    told = {
        "on": " It is told to let the assistant think first: `enable_thinking=True`.",
        "off": " It is told to ask for answers without reasoning: `enable_thinking=False`.",
    }
    return TEMPLATES[chat["template"]] + told.get(chat.get("thinking", ""), "")


def _headed(entry: AdapterEntry) -> bool:
    task = entry.declared_task
    return task is not None and task.head


EXAMPLE = "A text to read."
LABELS = 20
"""Of more labels than this, the README of an adapter lists none."""


def _loading(entry: AdapterEntry, record: BaseRecord) -> list[str]:
    """Code that loads the adapter, here and with plain PEFT; ``tests/adapters/test_readme.py``."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, autoescape=False,
    )  # fmt: skip
    task, embedded = entry.declared_task, record.id == "embedded"
    base = json.dumps(record.id if record.revision else f"path/to/{record.id}")
    pinned = f", revision={json.dumps(record.revision)}" if record.revision else ""
    head = task if task and task.head else None
    pooled, classes = bool(entry.pooling), head.head_classes if head else None
    labels = list(head.labels or ()) if head else []
    mean, sd = (task.scale if task else None) or (0.0, 1.0)
    return environment.get_template("loading.md").render(
        ours="" if embedded else f"{base}{pinned}",
        base='str(files("lora_domains") / "embedded" / "base")' if embedded else base,
        place=json.dumps(f"path/to/{entry.path}"), pinned=pinned, embedded=embedded,
        use=_use(task), text=json.dumps(EXAMPLE), pooled=pooled, classes=classes,
        loader="AutoModel" if pooled else
        f"AutoModelFor{'SequenceClassification' if classes else 'CausalLM'}",
        labels=", ".join(map(escaped, labels)) if len(labels) <= LABELS else "",
        outputs=head.outputs if head else "classes", mean=f"{mean:.8g}", sd=f"{sd:.8g}",
    ).splitlines()  # fmt: skip


def _use(task: Task | None) -> str:
    """A call of ``model`` with the adapter ``name``; empty where its task is unknown."""
    if task is None:
        return ""
    text: str | dict[str, str | list[str]] = EXAMPLE
    if not task.predictable:
        return f"model.generate({json.dumps(text)}, name, max_new_tokens=20)"
    try:
        task.to_predict(text, 0)
    except UsageError:  # its prompt has several columns
        text = dict.fromkeys(task.input_columns, EXAMPLE)
        with suppress(DataError):
            task.to_predict(text, 0)
            return f"model.predict({json.dumps(text)}, name)"
        text[task.input_columns[-1]] = ["first", "second"]  # candidates in one cell
    return f"model.predict({json.dumps(text)}, name)"
