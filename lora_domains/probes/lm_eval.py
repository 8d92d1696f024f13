"""Tasks of EleutherAI's lm-evaluation-harness as probes: ``--suite harness:arc_easy,hellaswag``.

The harness (Gao et al. 2024, doi 10.5281/zenodo.12608602) reads the documents, writes the prompts
and judges what comes back; likelihoods and texts are of this base, served by the current route. So
base and adapters answer identical requests in identical batches, and each document becomes an item
that is right or wrong. Its caches are not used: the one of answers does not know adapters (three of
them reported one score), the one of requests keeps an old prompt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

from lora_domains.data.general_text import embedded_texts
from lora_domains.data.tokenization import EncodedExample
from lora_domains.errors import DataError, UsageError, did_you_mean, listed
from lora_domains.inference.batches import token_budget
from lora_domains.inference.generation import generate
from lora_domains.inference.likelihoods import last_logits
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import IGNORED, chunks, collate
from lora_domains.modeling.routing import narrowed
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Example, Row, Task

MEASURES = ("acc", "exact_match", "acc_norm")
"""What says that a document was answered rightly, in this order; else a task's first metric."""
FEW_SHOT_SEED = 1234
"""The harness's own default."""
WRITTEN = 256
"""Tokens written at most where a task does not say, as in the harness."""


@dataclass(frozen=True)
class Harness(Task):
    """A task of lm-evaluation-harness, which writes its own prompts and scores the answers.

    For probes only. ``digest`` covers every request of the task (see ``_digest``).
    """

    name: str
    digest: str

    kind = "harness"
    scored_by = "requests"
    predictable = False
    metric = "accuracy"
    metrics = ("accuracy",)
    template = ""
    answer_column = None

    def example(self, row: Row) -> Example:
        """One document. Its text serves to find leaks; it is not what is scored."""
        return Example(row.id, str(row.values["text"]), "", place=row.place)


@dataclass(frozen=True)
class _Loaded:
    """A task of the harness with its requests, by document."""

    name: str
    task: Any
    documents: Mapping[str, list[Any]]
    measure: str


# Documents and functions of the harness, which a declaration (``Harness``) cannot hold.
_loaded: dict[Task, _Loaded] = {}


def harness_suite(names: Sequence[str]) -> Suite:
    """The named tasks, groups or YAML files, each task a probe; general text is the embedded one.

    Raises UsageError for an unknown name, for tasks that run code, look at images or sample, and
    where lm-eval is not installed; DataError when documents cannot be had.
    """
    probes = []
    for name, task in _tasks(names).items():
        loaded = _read(name, task)
        harness = Harness(name, _digest(loaded))
        _loaded[harness] = loaded
        rows = [{"text": _text(task, requests)} for requests in loaded.documents.values()]
        probes.append(Probe(name, harness, rows))
    return Suite("harness:" + ",".join(names), tuple(probes), lambda: embedded_texts("test"))


def _tasks(names: Sequence[str]) -> dict[str, Any]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            where="--suite harness:",
            expected="lm-evaluation-harness",
            found="no package lm_eval",
            hint="pip install 'lora-domains[harness]'",
        ) from None
    files = all(name.endswith((".yaml", ".yml")) for name in names)
    # Its own tasks are thousands of files, read only when one is named.
    manager = TaskManager(include_defaults=not files)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
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
                hint="Go online once, or name a YAML file whose rows lie on this machine.",
            ) from error
    return found


def _read(name: str, source: Any) -> _Loaded:
    """The requests of ``source``, a task of the harness."""
    for flag, what in (("UNSAFE_CODE", "runs what the model wrote"), ("MULTIMODAL", "has images")):
        if getattr(source, flag, False):
            raise _refused(name, "a task of texts alone", f"one that {what}")
    if source.get_config("num_fewshot") is None:
        source.set_config(key="num_fewshot", value=0)
    source.set_fewshot_seed(seed=FEW_SHOT_SEED)
    source.build_all_requests(cache_requests=False)
    documents: dict[str, list[Any]] = {}
    places: dict[int, str] = {}
    for request in source.instances:
        # Counted as ``Row.id`` counts them; the harness may number them otherwise.
        place = places.setdefault(request.doc_id, f"{name}:{len(places)}")
        documents.setdefault(place, []).append(request)
        if request.request_type == "generate_until" and request.args[1].get("do_sample"):
            raise _refused(name, "a task answered greedily", "one that samples its answers")
    for requests in documents.values():
        requests.sort(key=lambda request: request.idx)
    metrics = list(source.aggregation())
    measure = next((name for name in MEASURES if name in metrics), metrics[0])
    return _Loaded(name, source, documents, measure)


def _refused(name: str, expected: str, found: str) -> UsageError:
    return UsageError(
        where=f"harness:{name}", expected=expected, found=found, hint="Leave it out of --suite."
    )


def _text(task: Any, requests: Sequence[Any]) -> str:
    """The document's own words, without the examples before it."""
    words = task.doc_to_text(requests[0].doc)
    return words if isinstance(words, str) and words.strip() else str(requests[0].args[0])


def _digest(loaded: _Loaded) -> str:
    """sha256 of every request, what judges them, and the harness's version."""
    judge = [loaded.measure, loaded.task._filters[0].name, version("lm_eval")]
    digest = sha256(json.dumps(judge).encode())
    for place, requests in loaded.documents.items():
        asked = [[r.request_type, *map(str, r.args)] for r in requests]
        digest.update(json.dumps([place, asked]).encode())
    return digest.hexdigest()


# ── One contender on documents ──────────────────────────────────────────────────────────────────


def harness_scores(
    bank: Bank, task: Task, ids: Sequence[str], routes: str | Sequence[str | None] | None,
    advance: Callable[[int], object],
) -> list[dict[str, float]]:  # fmt: skip
    """For each document, right (1) or wrong (0) as ``prediction``, and the harness's own numbers.

    ``routes`` is an adapter (or the base, None) for all of them, or one for each.
    """
    loaded, model = _loaded[task], language_model(bank)
    # Copies: a request keeps its answers, and is asked again of the next contender.
    of_document = [[_fresh(request) for request in loaded.documents[i]] for i in ids]
    asked = [request for requests in of_document for request in requests]
    rows = [row for row, requests in enumerate(of_document) for _ in requests]
    for kind in dict.fromkeys(request.request_type for request in asked):
        places = [at for at, request in enumerate(asked) if request.request_type == kind]
        served = routes
        if routes is not None and not isinstance(routes, str):
            served = [routes[rows[at]] for at in places]
        with bank.routed(served):
            answers = getattr(model, kind)([asked[at] for at in places])
        for at, found in zip(places, answers, strict=True):
            asked[at].resps = [found] * (asked[at].repeats or 1)
    judge = loaded.task._filters[0]
    judge.apply(asked)
    scores = []
    for requests in of_document:
        said = [request.filtered_resps[judge.name] for request in requests]
        scores.append(_judged(loaded, requests[0].doc, said))
        advance(1)
    return scores


def _fresh(request: Any) -> Any:
    made = copy(request)
    made.resps, made.filtered_resps = [], {}
    return made


def _judged(loaded: _Loaded, doc: Any, answers: list[Any]) -> dict[str, float]:
    found = loaded.task.process_results(doc, answers)
    numbers = {k: float(v) for k, v in found.items() if isinstance(v, bool | int | float)}
    right = numbers.get(loaded.measure)
    if right not in (0.0, 1.0):
        raise _refused(
            loaded.name, "a task that says of each document whether it was answered rightly",
            f"{loaded.measure} with other values (it has {listed(found)})",
        )  # fmt: skip
    return {"prediction": int(right), **numbers}


# ── The model, as the harness calls it ──────────────────────────────────────────────────────────


def language_model(bank: Bank) -> Any:
    """An ``lm_eval.api.model.LM`` over the base of ``bank``, served by the current route.

    For the harness's own functions too: ``with model.using("medical"):
    lm_eval.simple_evaluate(language_model(model.bank), tasks=["arc_easy"])``. Raises UsageError
    when it is given ``use_cache``.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    base, tokenizer = bank.base, bank.base.tokenizer

    class RoutedLM(TemplateLM):
        """Tokenised as the harness's own ``HFLM`` does it, scored by ``continuations``."""

        tokenizer = base.tokenizer
        max_length = base.context
        device = base.device

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            first = tokenizer.bos_token_id
            return self.eot_token_id if first is None else int(first)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            given = string.startswith(tokenizer.decode(self.prefix_token_id))
            special = not given if add_special_tokens is None else add_special_tokens
            ids: list[int] = tokenizer.encode(string, add_special_tokens=special)
            return ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, answer) for _, context, answer in requests]
            return continuations(bank, pairs, range(len(pairs)))

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return found

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            pairs: list[Any] = []
            rows: list[int] = []
            for row, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
                pairs += [make_disjoint_window(window) for window in windows]
                rows += [row] * (len(pairs) - len(rows))
            found = [0.0] * len(requests)
            for row, (logprob, _) in zip(rows, continuations(bank, pairs, rows), strict=True):
                found[row] += logprob
            return found

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            prompts = [(self.tok_encode(r.args[0]), dict(r.args[1])) for r in requests]
            return written(bank, prompts)

        def set_cache_hook(self, cache_hook: object) -> None:
            raise UsageError(
                where="use_cache",
                expected="no cache of answers: it does not know which adapter gave them",
                found="use_cache",
                hint="Leave it out; `lora-domains benchmark` keeps scores by adapter.",
            )

    return RoutedLM()


@torch.no_grad()
def continuations(
    bank: Bank, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[int]
) -> list[tuple[float, bool]]:
    """For each (context, answer) in tokens: the answer's log-likelihood, and whether it is greedy.

    ``rows`` gives each its row of the current route. What is too long loses its beginning.
    """
    model, pad = bank.base.model, bank.base.tokenizer.pad_token_id
    items = []
    for at, (context, answer) in enumerate(pairs):
        # The last token is predicted, never read: one more than the context fits.
        room = bank.base.context + 1 - len(answer)
        if room < 1:
            raise _too_long(bank.base.context, len(answer))
        items.append(EncodedExample(str(at), tuple(context[-room:]), tuple(answer)))
    found = [(0.0, False)] * len(items)
    for chunk in chunks(items, token_budget(model.device)):
        batch = collate([items[i] for i in chunk], pad, model.device)
        width = batch.labels.shape[1]
        ids, mask, positions = (part[:, :-1] for part in (batch.ids, batch.mask, batch.positions))
        with narrowed(model, [rows[i] for i in chunk]):
            logits = last_logits(model, ids, mask, positions, width).float()
        here = batch.labels != IGNORED
        labels = batch.labels.clamp(min=0)
        logprobs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        total = (logprobs.double() * here).sum(1).tolist()
        greedy = ((logits.argmax(-1) == labels) | ~here).all(1).tolist()
        for i, logprob, best in zip(chunk, total, greedy, strict=True):
            found[i] = (logprob, best)
    return found


def written(bank: Bank, prompts: Sequence[tuple[list[int], dict[str, Any]]]) -> list[str]:
    """The greedy continuation of each prompt (token ids, the harness's options) up to its stop."""
    from transformers import StopStringCriteria

    model, tokenizer = bank.base.model, bank.base.tokenizer
    found = [""] * len(prompts)
    kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for at, (_, options) in enumerate(prompts):
        until = options.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        most = next((options[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens")
                     if options.get(k)), WRITTEN)  # fmt: skip
        kinds.setdefault((stops, int(most)), []).append(at)
    for (stops, most), places in kinds.items():
        room = bank.base.context - most
        if room < 1:
            raise _too_long(bank.base.context, most)
        items = [EncodedExample(str(at), tuple(prompts[at][0][-room:]), ()) for at in places]
        known = tuple(filter(None, stops))
        criteria = [StopStringCriteria(tokenizer, list(known))] if known else []
        for chunk in chunks(items, token_budget(model.device)):
            with narrowed(model, [places[i] for i in chunk]):
                texts = generate(
                    model, tokenizer, [items[i].prompt for i in chunk], max_new_tokens=most,
                    stopping_criteria=criteria,
                )  # fmt: skip
            for i, text in zip(chunk, texts, strict=True):
                for stop in known:
                    text = text.split(stop)[0]
                found[places[i]] = text
    return found


def _too_long(context: int, answer: int) -> UsageError:
    return UsageError(
        expected=f"answers that leave room in a context of {context} tokens",
        found=f"an answer of {answer} tokens",
        hint="Choose a base with a longer context, or leave the task out of --suite.",
    )
