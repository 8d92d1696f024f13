"""Probes of lm-evaluation-harness, offline; its own model class HFLM is the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from support.adapters import save, strong

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.inference.batches import no_progress
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank, Domains
from lora_domains.modeling.base import load_base
from lora_domains.probes.lm_eval import Documents, Harness, harness_tasks
from lora_domains.probes.suite import Probe, Suite, load_suite
from lora_domains.tasks import Classification
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[harness]'")

QUESTIONS = [
    {"q": f"The {a} {b} is", "choices": ["red", "blue", f"{b}"], "gold": n % 3}
    for n, (a, b) in enumerate(
        (a, b) for a in ("alpha", "beta", "gamma", "delta") for b in ("cloud", "note", "prize")
    )
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["a", "\\n"], max_gen_toks: 12, do_sample: {sample}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of datasets for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def yaml(folder: Path, template: str, name: str = "local_task", **fields: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    path = folder / f"{name}.yaml"
    path.write_text(template.format(name=name, file=file, **fields))
    return path


@pytest.fixture
def bank(tiny_base: Path) -> Bank:
    made = Bank(load_base(tiny_base, device="cpu"))
    for name, seed in (("one", 1), ("two", 2)):
        made.add(strong(made.base, name, seed))
    return made


def requests(path: Path) -> list[Any]:
    (documents,) = (Documents.read(*named) for named in harness_tasks([str(path)]).items())
    return [request for of_one in documents.requests.values() for request in of_one]


def scored(
    probe: Probe, bank: Bank, examples: list[EncodedExample], routes: Domains
) -> list[dict[str, float]]:
    assert probe.score is not None
    return probe.score(bank, probe.task, examples, [""] * len(examples), routes, no_progress)


def oracle(tiny_base: Path, model: Any = None) -> Any:
    """The harness's own model class on the same weights, in batches of one."""
    from lm_eval.models.huggingface import HFLM

    base = load_base(tiny_base, device="cpu")
    return HFLM(pretrained=model or base.model, tokenizer=base.tokenizer, batch_size=1,
                max_length=base.context)  # fmt: skip


def merged(tiny_base: Path, bank: Bank, name: str, folder: Path) -> Any:
    """The adapter ``name`` on the same base by plain PEFT."""
    from peft import PeftModel

    path = save(folder / name, bank[name], bank.base)
    return PeftModel.from_pretrained(load_base(tiny_base, device="cpu").model, path)


@pytest.mark.parametrize("route", [None, "one"])
def test_likelihoods_equal_those_of_the_harness(
    bank: Bank, tiny_base: Path, tmp_path: Path, route: str | None
) -> None:
    from lora_domains.probes.lm_eval_model import RoutedLM

    instances = requests(yaml(tmp_path, CHOICE))
    # Longer than the context, with its own BOS, without a context, with a trailing space.
    instances += [
        type(instances[0])("loglikelihood", {}, pair, 0)
        for pair in (("alpha river " * 90, " beta cloud"), ("<s>alpha river", " beta"),
                     ("", " beta cloud"), ("alpha river ", "beta"))
    ]  # fmt: skip
    theirs = oracle(tiny_base, merged(tiny_base, bank, route, tmp_path) if route else None)
    with bank.routed(route):
        ours = RoutedLM(bank).loglikelihood(instances)
    wanted = theirs.loglikelihood(instances, disable_tqdm=True)
    for (one, greedy), (other, also) in zip(ours, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy == also


def test_likelihoods_equal_those_of_choice_logprobs(bank: Bank, tmp_path: Path) -> None:
    from lora_domains.probes.lm_eval_model import RoutedLM
    from lora_domains.tasks import MultipleChoice, Row

    instances = requests(yaml(tmp_path, CHOICE))
    tokenization = Tokenization(bank.base.tokenizer, bank.base.context)
    task = MultipleChoice("q", "choices", "gold", prompt="{q}")
    items = [
        tokenization.encode(task.example(Row(row, "t", n, ""))) for n, row in enumerate(QUESTIONS)
    ]
    with bank.routed("two"):
        ours = choice_logprobs(bank.base.model, items, bank.base.pad)
        through = RoutedLM(bank).loglikelihood(instances)
    assert [pair[0] for pair in through] == pytest.approx(
        [float(value) for row in ours for value in row], abs=1e-4
    )


def test_rolling_likelihoods_and_generated_answers_equal_those_of_the_harness(
    bank: Bank, tiny_base: Path, tmp_path: Path
) -> None:
    from lora_domains.probes.lm_eval_model import RoutedLM

    theirs = oracle(tiny_base, merged(tiny_base, bank, "one", tmp_path))
    written = requests(yaml(tmp_path, WRITTEN, sample="false"))
    # The second text has several windows: the context is 128 tokens.
    rolling = [
        type(written[0])("loglikelihood_rolling", {}, (text,), 0)
        for text in ("alpha beta gamma", "the red stone is of a green cloud and " * 30)
    ]
    with bank.routed("one"):
        ours = RoutedLM(bank)
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(
            theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
        )
        assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


@pytest.mark.parametrize(
    ("template", "request_type", "function", "rows_at"),
    [(CHOICE, "loglikelihood", "last_logits", 1), (WRITTEN, "generate_until", "generate", 2)],
)  # fmt: skip
def test_a_batch_that_runs_out_of_memory_is_halved(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    template: str, request_type: str, function: str, rows_at: int,
) -> None:  # fmt: skip
    """``rows_at`` is the position of the rows among the arguments of ``function``."""
    from lora_domains.probes import lm_eval_model

    fields = {"sample": "false"} if template == WRITTEN else {}
    instances = requests(yaml(tmp_path, template, **fields))
    routes = (["one", "two", None] * len(instances))[: len(instances)]
    unlimited = getattr(lm_eval_model, function)
    sizes: list[int] = []

    def answers() -> list[Any]:
        with bank.routed(routes):
            return list(getattr(lm_eval_model.RoutedLM(bank), request_type)(instances))

    def limited(*args: Any, **options: Any) -> Any:
        sizes.append(len(args[rows_at]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return unlimited(*args, **options)

    whole = answers()
    monkeypatch.setattr(lm_eval_model, function, limited)
    halved = answers()
    assert max(sizes) > 2
    if function == "generate":
        assert halved == whole
    else:
        assert np.array(halved) == pytest.approx(np.array(whole), abs=1e-4)


def test_documents_are_scored_as_the_harness_scores_them(
    bank: Bank, tiny_base: Path, tmp_path: Path
) -> None:
    import lm_eval

    from lora_domains.probes.lm_eval_model import RoutedLM

    path = yaml(tmp_path, CHOICE)
    (probe,) = load_suite(f"harness:{path}").probes
    tokenization = Tokenization(bank.base.tokenizer, bank.base.context)
    items = [tokenization.encode(example) for _, example in probe.examples()]
    alone = {route: scored(probe, bank, items, route) for route in (None, "one", "two")}
    with bank.routed("one"):
        theirs = lm_eval.simple_evaluate(
            RoutedLM(bank), tasks=[str(path)], bootstrap_iters=0,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )  # fmt: skip
    wanted = [sample["acc"] for sample in theirs["samples"]["local_task"]]
    assert [score["prediction"] for score in alone["one"]] == wanted
    assert len({tuple(s["prediction"] for s in scores) for scores in alone.values()}) > 1
    # In one mixed batch each document has a contender.
    mixed = [(item, route) for item in items for route in alone]
    together = scored(probe, bank, [i for i, _ in mixed], [r for _, r in mixed])
    assert together == [s for scores in zip(*alone.values(), strict=True) for s in scores]


def test_a_cache_of_answers_is_refused(bank: Bank, tmp_path: Path) -> None:
    import lm_eval

    from lora_domains.probes.lm_eval_model import RoutedLM

    with pytest.raises(UsageError, match="which adapter gave them"):
        lm_eval.simple_evaluate(
            RoutedLM(bank), tasks=[str(yaml(tmp_path, CHOICE))],
            use_cache=str(tmp_path / "answers"),
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "fields", "words"),
    [(WRITTEN, {"sample": "true"}, "samples"), (ROLLING, {}, "word_perplexity")],
    ids=["sampling", "perplexity"],
)
def test_tasks_that_cannot_be_compared_are_refused(
    bank: Bank, tmp_path: Path, template: str, fields: dict[str, str], words: str
) -> None:
    tokenization = Tokenization(bank.base.tokenizer, bank.base.context)

    def evaluate() -> None:
        (probe,) = load_suite(f"harness:{yaml(tmp_path, template, **fields)}").probes
        items = [tokenization.encode(example) for _, example in probe.examples()]
        scored(probe, bank, items, None)

    with pytest.raises(UsageError, match=words):
        evaluate()


def test_an_unknown_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.yaml"):
        load_suite(f"harness:{tmp_path / 'no.yaml'}")


def task_digest(suite: Suite) -> str:
    (probe,) = suite.probes
    assert isinstance(probe.task, Harness)
    return probe.task.digest


def test_the_digest_depends_on_the_prompt(tmp_path: Path) -> None:
    first = load_suite(f"harness:{yaml(tmp_path, CHOICE)}")
    again = load_suite(f"harness:{yaml(tmp_path, CHOICE)}")
    other = load_suite(f"harness:{yaml(tmp_path, CHOICE.replace('{{{{q}}}}', '{{{{q}}}} a'))}")
    assert task_digest(first) == task_digest(again) != task_digest(other)


@pytest.mark.slow
def test_an_adapter_is_evaluated_on_a_task_of_the_harness(tiny_base: Path, tmp_path: Path) -> None:
    model = DomainModel.from_pretrained(
        tiny_base, out=tmp_path / "adapters", display=Display(quiet=True), device="cpu"
    )
    rows = make_rows(60)
    domain = with_settings(
        Domain("spam", Classification(), Data(rows[:30], rows[30:40], rows[40:])),
        epochs=1, rank=4, lr=0.01,
    )  # fmt: skip
    model.fit(domain)
    suite = load_suite(f"harness:{yaml(tmp_path, CHOICE)}", limit=8)
    entry = model.evaluate(domain, suite=suite).entry
    # The rows and the general text of the default retention are searched for the questions.
    (leaks,) = (gate for gate in entry.gates if gate["name"] == "leaks")
    assert leaks["verdict"] == "pass"
    assert entry.general["local_task"]["n"] == entry.general["pooled"]["n"] == 8
    items = [
        json.loads(line)
        for line in (tmp_path / "adapters" / "spam" / "items.jsonl").read_text().splitlines()
    ]
    general = [item for item in items if item["set"] == "general"]
    assert {item["suite"] for item in general} == {"local_task"}
    assert all(item["scores"].keys() == {"base", "adapter"} for item in general)
    assert "cloud" not in json.dumps(general)
    # A benchmark, in mixed batches and with a store, gives the same scores.
    report = model.benchmark(suite, out=tmp_path / "reports").report
    assert report.adapters[0].general["local_task"] == entry.general["local_task"]
