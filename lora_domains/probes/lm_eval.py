"""Tasks of EleutherAI's lm-evaluation-harness as probes: ``--suite harness:arc_easy,hellaswag``.

The harness (Gao et al. 2024, doi 10.5281/zenodo.12608602) reads the documents, writes the prompts
and scores the answers; likelihoods and texts come from the base with the routed adapter
(``lm_eval_model``). So base and adapter answer identical requests in identical batches, and each
document becomes an item that is right or wrong. The harness's caches are not used: its cache of
answers does not tell adapters apart (three adapters got one score), and its cache of requests
returns outdated prompts.
"""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from lora_domains.errors import DataError, UsageError, check_installed, did_you_mean, listed
from lora_domains.inference.batches import Progress, no_progress
from lora_domains.inference.scores import Scores
from lora_domains.modeling.bank import Bank, Domains
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Example, Row, Task
from lora_domains.tokenization.encoded import EncodedExample

MEASURES = ("acc", "exact_match", "acc_norm")
"""The metric that says whether a document was answered correctly: the first of these that a task
has, else its first metric."""
FEW_SHOT_SEED = 1234
"""The harness's own default."""


@dataclass(frozen=True)
class Harness(Task):
    """A task of lm-evaluation-harness, which writes its own prompts; for probes only.

    ``digest`` covers every request of the task. ``Documents`` scores it.
    """

    name: str
    digest: str

    kind = "harness"
    predictable = False
    metric = "accuracy"
    template = ""
    answer_column = None

    def example(self, row: Row) -> Example:
        """One document. Its text serves to find leaks; it is not what is scored."""
        return Example(row.id, str(row.values["text"]), "", place=row.place)


def harness_suite(names: Sequence[str]) -> Suite:
    """The named tasks, groups or YAML files, each task a probe; general text is the embedded one.

    Raises UsageError for an unknown name, for tasks that run code, read images or sample, and
    where lm-eval is not installed; DataError when documents cannot be read.
    """
    probes = []
    for name, source in harness_tasks(names).items():
        documents = Documents.read(name, source)
        rows = [{"text": text} for text in documents.texts()]
        probes.append(Probe(name, Harness(name, documents.digest()), rows, score=documents.scores))
    return Suite("harness:" + ",".join(names), tuple(probes), lambda: embedded_texts("test"))


def harness_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The harness's own task objects by their names; raises what ``harness_suite`` does."""
    check_installed("--suite harness:", "lm-evaluation-harness", "harness", ["lm_eval"])
    from lm_eval.tasks import TaskManager

    files = all(name.endswith((".yaml", ".yml")) for name in names)
    # The harness's own tasks are thousands of files, read only when one is named.
    manager = TaskManager(include_defaults=not files)
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except KeyError:
            raise UsageError(
                where="--suite harness:",
                expected="a task, a group or a YAML file of lm-evaluation-harness",
                found=repr(name),
                hint=did_you_mean(name, manager.all_tasks) if not files else "Check the path.",
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                where=f"harness:{name}",
                expected="documents that can be read",
                found=type(error).__name__,
                hint="Go online once, or name a YAML file whose rows are on this machine.",
            ) from error
    return tasks


@dataclass(frozen=True)
class Documents:
    """The requests of one task of the harness, by document, and how the harness scores them."""

    name: str
    source: Any
    """The harness's own task."""
    requests: Mapping[str, list[Any]]
    measure: str

    @classmethod
    def read(cls, name: str, source: Any) -> "Documents":
        """Raises UsageError for a task that cannot be compared between contenders."""
        for flag, what in (
            ("UNSAFE_CODE", "runs code that the model wrote"), ("MULTIMODAL", "has images")
        ):  # fmt: skip
            if getattr(source, flag, False):
                raise _refused(name, "a task of texts alone", f"one that {what}")
        if source.get_config("num_fewshot") is None:
            source.set_config(key="num_fewshot", value=0)
        source.set_fewshot_seed(seed=FEW_SHOT_SEED)
        source.build_all_requests(cache_requests=False)
        documents: dict[str, list[Any]] = {}
        ids: dict[int, str] = {}
        for request in source.instances:
            # Numbered as ``Row.id`` numbers them; the harness may number them otherwise.
            document = ids.setdefault(request.doc_id, f"{name}:{len(ids)}")
            documents.setdefault(document, []).append(request)
            if request.request_type == "generate_until" and request.args[1].get("do_sample"):
                raise _refused(name, "a task answered greedily", "one that samples its answers")
        for requests in documents.values():
            requests.sort(key=lambda request: request.idx)
        metrics = list(source.aggregation())
        measure = next((name for name in MEASURES if name in metrics), metrics[0])
        return cls(name, source, documents, measure)

    def texts(self) -> list[str]:
        """The text of each document, without the examples before it."""
        texts = []
        for requests in self.requests.values():
            text = self.source.doc_to_text(requests[0].doc)
            own = isinstance(text, str) and text.strip()
            texts.append(text if own else str(requests[0].args[0]))
        return texts

    def digest(self) -> str:
        """sha256 of every request, of how it is scored, and of the harness's version."""
        scoring = [self.measure, self.source._filters[0].name, version("lm_eval")]
        digest = sha256(json.dumps(scoring).encode())
        for document, requests in self.requests.items():
            arguments = [[r.request_type, *map(str, r.args)] for r in requests]
            digest.update(json.dumps([document, arguments]).encode())
        return digest.hexdigest()

    def scores(
        self, bank: Bank, task: Task, examples: Sequence[EncodedExample], references: Sequence[str],
        routes: Domains, progress: Progress = no_progress,
    ) -> Scores:  # fmt: skip
        """The records of the documents that ``examples`` stand for; see ``model_scores``.

        ``prediction`` is 1 for a correct answer, else 0; the harness's own numbers are beside it.
        """
        # Copies: a request keeps its answers, and is used again for the next contender.
        documents = [[_fresh(r) for r in self.requests[example.id]] for example in examples]
        self._answer(bank, documents, routes)
        scoring = self.source._filters[0]
        scoring.apply([request for requests in documents for request in requests])
        scores = []
        for requests in documents:
            answers = [request.filtered_resps[scoring.name] for request in requests]
            scores.append(self._score(requests[0].doc, answers))
            progress(1)
        return scores

    def _answer(self, bank: Bank, documents: Sequence[Sequence[Any]], routes: Domains) -> None:
        """Put the answers of the contenders in ``routes`` into the requests."""
        from lora_domains.probes.lm_eval_model import RoutedLM

        model = RoutedLM(bank)
        pairs = [(row, request) for row, requests in enumerate(documents) for request in requests]
        for kind in dict.fromkeys(request.request_type for _, request in pairs):
            rows, requests = zip(*((n, r) for n, r in pairs if r.request_type == kind), strict=True)
            routed = routes
            if routes is not None and not isinstance(routes, str):
                routed = [routes[row] for row in rows]
            with bank.routed(routed):
                answers = getattr(model, kind)(list(requests))
            for request, answer in zip(requests, answers, strict=True):
                request.resps = [answer] * (request.repeats or 1)

    def _score(self, document: Any, answers: list[Any]) -> dict[str, float]:
        results = self.source.process_results(document, answers)
        numbers = {k: float(v) for k, v in results.items() if isinstance(v, bool | int | float)}
        correct = numbers.get(self.measure)
        if correct not in (0.0, 1.0):
            raise _refused(
                self.name, "a task that says of each document whether it was answered correctly",
                f"{self.measure} with other values (it has {listed(results)})",
            )  # fmt: skip
        return {"prediction": int(correct), **numbers}


def _fresh(request: Any) -> Any:
    """The request without answers."""
    fresh = copy(request)
    fresh.resps, fresh.filtered_resps = [], {}
    return fresh


def _refused(name: str, expected: str, found: str) -> UsageError:
    return UsageError(
        where=f"harness:{name}", expected=expected, found=found, hint="Leave it out of --suite."
    )
