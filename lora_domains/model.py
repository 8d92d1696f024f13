"""``DomainModel``: the one object people meet, thin over the files that do the work."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from lora_domains import distributed
from lora_domains.adapters.folder import find_adapter
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.merging import export, merge
from lora_domains.adapters.parent import continued_task, load_parent, with_labels_of
from lora_domains.console import Display, format_bytes
from lora_domains.data.source import Data, Source
from lora_domains.dataset import Dataset, load_dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.evaluation.benchmark import measure
from lora_domains.evaluation.scorer import Scorer
from lora_domains.evaluation.store import Store
from lora_domains.evaluation.verdict_run import evaluate
from lora_domains.inference.likelihoods import witness
from lora_domains.inference.predict import (
    Prediction,
    continuations,
    predict,
    row_domains,
    stream,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, Quantization, load_base
from lora_domains.modeling.environment import environment
from lora_domains.modeling.heads import check_generates
from lora_domains.modeling.memory import free_bytes, memory_warning
from lora_domains.modeling.routing import entered
from lora_domains.probes.suite import Suite, embedded, load_suite
from lora_domains.report.card import BaseRecord, Card
from lora_domains.report.report import Benchmark, Evaluation, assemble, summed_up
from lora_domains.tasks import Classification
from lora_domains.training.fit import fit, resumed_parent
from lora_domains.training.tracking import check_tracker


class DomainModel:
    """One frozen base and the adapters resident on it.

    Called like the model it wraps: ``model(input_ids=…).logits``, served by whatever ``using``
    says. ``out`` is the folder that adapters are saved to and found in.
    """

    def __init__(
        self,
        base: Base,
        *,
        slots: int | None = None,
        out: str | Path = "adapters",
        display: Display | None = None,
    ) -> None:
        self.base = base
        self.bank = Bank(base, slots)
        self.out = Path(out)
        self.display = display or Display(quiet=not distributed.is_main())
        self._datasets: dict[str, Dataset] = {}
        self._witness = witness(base)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        quantization: Quantization | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        slots: int | None = None,
        out: str | Path = "adapters",
        display: Display | None = None,
    ) -> Self:
        """A base from a folder or a Hub id; without an argument, the embedded one.

        ``slots`` is how many adapters may lie on the device at once (see ``Bank``). Raises
        BaseModelError when it cannot be found or loaded.
        """
        shown = display or Display(quiet=not distributed.is_main())

        def announce(needed: int, place: torch.device) -> None:
            free = free_bytes(place)
            if display:
                what = (
                    f"about {format_bytes(needed)} for the base, "
                    f"of {format_bytes(free)} free on {place}"
                )
                shown.stage("memory", None, None, what)
            if warning := memory_warning(needed, free, quantization):
                shown.warn(warning)

        base = load_base(
            path_or_id,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            device=device,
            announce=announce,
        )
        return cls(base, slots=slots, out=out, display=display)

    def __call__(
        self,
        *args: Any,
        domain: str | None = None,
        domains: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A forward pass, served by ``domain``, by ``domains`` row by row, or as ``using`` says."""
        batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        rows = row_domains(domain, domains, 1 if batch is None else len(batch))
        if rows is None:
            return self.base.model(*args, **kwargs)
        with self.bank.routed(rows):
            return self.base.model(*args, **kwargs)

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def domains(self) -> tuple[str, ...]:
        """The resident adapters."""
        return tuple(self.bank)

    # Adapters

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Make a saved adapter resident; returns its name.

        Takes folders saved here or by plain PEFT. Raises AdapterMismatch, AdapterCorrupt,
        AdapterUnsupported or AdapterError, and then the bank is as it was.
        """
        adapter = load_adapter(find_adapter(path, self.out), self.base, name)
        self.bank.add(adapter)
        for note in adapter.notes:
            self.display.warn(note)
        return adapter.name

    def unload(self, name: str) -> None:
        """Take a resident adapter out; its folder stays, and calls in flight go on with it."""
        self.bank.remove(name)

    def merged(self, name: str, *, dtype: str | torch.dtype | None = None) -> Any:
        """A stand-alone transformers model: the base with the resident adapter ``name`` in it.

        The base is read once more, unquantised, in its own dtype or ``dtype``; the resident one
        stays as it is. How far the result is from the adapter un-merged is shown. Raises
        UsageError, BaseModelError or AdapterError.
        """
        found = merge(self.bank, name, dtype)
        self.display.stage("merged", None, None, str(found))
        return found.model

    def export(
        self, name: str, folder: str | Path, *, dtype: str | torch.dtype | None = None
    ) -> None:
        """``merged``, written with its tokenizer as a folder that plain transformers loads.

        Raises AdapterError too when ``folder`` holds anything but a merged model.
        """
        found = export(self.bank, name, Path(folder), dtype)
        self.display.stage("merged", None, None, str(found))
        self.display.line(f"Saved: {folder}")

    def using(self, name: str | None) -> AbstractContextManager[Self]:
        """Serve every call inside by the adapter ``name``; None is the base.

        Safe across threads and tasks, nested and on exceptions. A thread started inside begins
        at the base: enter ``using`` there. Inside a generator that yields, name the domain in each
        call instead: what ``using`` says would hold for whoever is given the value. Raises
        UsageError for a name that is not resident, and for blocks left out of order.
        """
        return entered(self.base.model, self.bank.route(name), self)

    # Training

    def fit(
        self,
        domain: Domain | Source,
        *,
        name: str | None = None,
        text: str | tuple[str, ...] = "text",
        label: str = "label",
        positive: str | None = None,
        head: bool = False,
        validation: Source | None = None,
        test: Source | None = None,
        init_from: str | Path | None = None,
        resume: bool = False,
        tracker: str | None = None,
        dry_run: bool = False,
        **settings: Any,
    ) -> Card | None:
        """Train an adapter for a domain, or for rows with a text and a label; saves and loads it.

        ``init_from`` is a saved adapter to go on from; one that is replaced becomes a version
        (``versions``). ``tracker`` is tensorboard, wandb or trackio. ``dry_run`` plans, tries one
        step, and trains and writes nothing. ``settings`` are those of a domain (``epochs=3``,
        ``lr=…``, ``rank=…``); unknown names raise UsageError.

        Returns the card, which has no verdict before ``evaluate``; None after a dry run.
        Raises DataError, LeakError or TrainingError; the adapter saved before is untouched then,
        unless an epoch was finished: the best one takes its place, and it becomes a version.
        """
        if not isinstance(domain, Domain):
            if name is None:
                raise UsageError(
                    expected="a name for the adapter",
                    found="rows without one",
                    hint="Call fit(rows, name='spam').",
                )
            task = Classification(text=text, label=label, positive=positive, head=head)
            domain = Domain(name, task, Data(domain, validation, test))
        domain = with_settings(domain, **settings)
        if tracker is not None:
            check_tracker(tracker)
        for warning in distributed.launch_warnings():
            self.display.warn(warning)
        parent = None
        if init_from is not None:
            parent = load_parent(find_adapter(init_from, self.out), self.base)
            domain = replace(domain, task=continued_task(parent.adapter, domain.task))
        dataset = self._load(domain)
        if parent is not None:
            if resume:
                parent = resumed_parent(parent, dataset, self.base, self.out)
            dataset = replace(dataset, parent=parent)
        self._datasets[domain.name] = dataset
        card = fit(
            self.bank, dataset, self.out, self.display,
            resume=resume, tracker=tracker, dry_run=dry_run,
        )  # fmt: skip
        if card is None:
            return None
        # Evaluate the adapter as it is on disk.
        self.load_adapter(self.out / domain.name)
        return card

    def dataset(self, domain: Domain | str) -> Dataset:
        """The rows of ``domain``, read, split and tokenised for this base.

        A name stands for a domain fitted by this model. Raises UsageError for an unknown name,
        DataError or LeakError for rows that cannot be used.
        """
        if isinstance(domain, str):
            if domain not in self._datasets:
                raise UsageError(
                    expected="a domain fitted in this process, or a Domain",
                    found=repr(domain),
                    hint="Pass the Domain itself: evaluate(load_domain('recipes/medical.py')).",
                )
            return self._datasets[domain]
        for name in self.domains:
            card = self.bank[name].card
            if card and card.adapter.domain == domain.name:
                domain = replace(domain, task=with_labels_of(card, domain.task))
        known = self._datasets.get(domain.name)
        return (known and known.for_domain(domain)) or self._load(domain)

    def _load(self, domain: Domain) -> Dataset:
        dataset = load_dataset(domain, self.base, self.display)
        self._datasets[domain.name] = dataset
        return dataset

    # Measuring

    def evaluate(self, domain: Domain | str, *, suite: Suite | None = None) -> Evaluation:
        """Base, adapter and baselines on the domain's test rows, and on general questions.

        Writes scores, gates and verdict into the adapter's card. Raises AdapterError when the
        domain has no adapter in ``out`` or in memory, UsageError for other training rows than it
        was trained on.
        """
        if isinstance(domain, Domain) and domain.name not in self.bank:
            self.load_adapter(self.out / domain.name)
        card = evaluate(
            self.bank, self.dataset(domain), suite or embedded(), self.out, self.display,
            self._base_changed,
        )  # fmt: skip
        return Evaluation(card)

    def benchmark(
        self, suite: Suite | str = "embedded", domains: Sequence[Domain] = (),
        out: str | Path = "reports", *, show_text: bool = False,
    ) -> Benchmark:  # fmt: skip
        """Every resident adapter on the same general questions, and on the rows of ``domains``.

        An adapter whose own domain is not among ``domains`` keeps the scores of its last
        evaluation. Scores are kept under ``out``, so that a run that was stopped goes on.
        ``show_text`` takes the text of rows that were answered wrongly into the report, where a
        domain allows it. Raises UsageError when no adapter is resident, or one was never evaluated.
        """
        if not self.bank:
            raise UsageError(
                expected="at least one resident adapter",
                found="none",
                hint="Load some: model.load_adapter('adapters/medical').",
            )
        suite = load_suite(suite) if isinstance(suite, str) else suite
        datasets = [self.dataset(domain) for domain in domains]
        scorer = Scorer(self.bank, self.display, Store(Path(out) / ".scores"))
        found = measure(scorer, suite, datasets, self.out, self._base_changed)
        report = assemble(
            BaseRecord(**self.base.record()), environment(self.base, suite.seed),
            {n: summed_up(n, entry, items, show_text) for n, (entry, items) in found.items()},
        )  # fmt: skip
        return Benchmark(report, {name: items for name, (_, items) in found.items()})

    def _base_changed(self) -> bool:
        return witness(self.base) != self._witness

    # Using

    def predict(
        self,
        texts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        domain: str | None = None,
        *,
        domains: Sequence[str | None] | None = None,
        refer_below: float = 0.0,
    ) -> list[Prediction | str]:
        """Labels with probabilities (classification) or answers (generation), one per text.

        A text is a string, or a row with the columns of the domain's prompt. ``domain`` is a
        resident adapter, ``domains`` one for each text; without either, what ``using`` says. A
        label less probable than ``refer_below`` is replaced by ``refer``: a person should look (the
        card's ``calibration`` says what that costs and saves).
        """
        many = [texts] if isinstance(texts, str | Mapping) else list(texts)
        route = self.bank.current()
        if domain is None and domains is None and route is not None:
            said = route.domains
            domain, domains = (said[0], None) if len(said) == 1 else (None, said)
        names = [name for name in row_domains(domain, domains, len(many)) or () if name is not None]
        if len(names) < len(many):
            raise UsageError(
                expected="a domain to predict for",
                found="none",
                hint="Call predict(texts, domain='medical'), or inside using('medical').",
            )
        return predict(self.bank, many, names, refer_below, self.display.warn)

    def generate(
        self,
        prompts: str | Sequence[str],
        domain: str | None = None,
        *,
        domains: Sequence[str | None] | None = None,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> str | list[str]:
        """Continue one prompt or several, greedily unless ``options`` (as in transformers) say so.

        ``domain`` is a resident adapter, ``domains`` one for each prompt (None is the base);
        without either, what ``using`` says. Rows are sorted by domain first, which matters to
        random sampling only.
        """
        check_generates(self.base)
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = row_domains(domain, domains, len(many))
        texts = continuations(self.bank, many, rows, max_new_tokens=max_new_tokens, **options)
        # num_return_sequences gives several for one prompt.
        return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts

    def stream(
        self, prompt: str, domain: str | None = None, *, max_new_tokens: int = 64, **options: Any
    ) -> Iterator[str]:
        """The text that ``generate`` would give, piece by piece as it is written.

        It is served by what was said when this was called, wherever it is read.
        """
        return stream(self.bank, prompt, domain, max_new_tokens=max_new_tokens, **options)


__all__ = ["DomainModel", "Evaluation", "Prediction"]
