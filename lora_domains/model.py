"""``DomainModel``: one base and its adapters, to train, evaluate and use."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self, overload

import torch

from lora_domains import distributed
from lora_domains.adapters.folder import find_adapter
from lora_domains.adapters.foreign import check_labels
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.merging import export, merge
from lora_domains.adapters.parent import as_trained
from lora_domains.console import Display
from lora_domains.console.reprs import Predictions, model_in_html
from lora_domains.data.prepare import Prepared
from lora_domains.data.source import Source, in_memory, index_of
from lora_domains.dataset import Dataset, declared_domain, load_dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.evaluation.benchmark import benchmark
from lora_domains.evaluation.verdict_run import evaluate, evaluation_seconds
from lora_domains.inference.batches import in_blocks, row_domains, text_domains, with_domains
from lora_domains.inference.likelihoods import base_state
from lora_domains.inference.memory import base_in_words, release, report_memory, weights_bar
from lora_domains.inference.predict import Answer, continuations, predict, stream
from lora_domains.joint.fit import fit_all, requested
from lora_domains.joint.grid import check_variants
from lora_domains.joint.seeds import score_seeds, seed_datasets
from lora_domains.joint.sweep import fit_sweep
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.heads import check_generates
from lora_domains.modeling.quantization import Quantization
from lora_domains.modeling.routing import entered
from lora_domains.placement import DeviceMap
from lora_domains.probes import suite as suites
from lora_domains.probes.suite import Suite
from lora_domains.report.card import Card
from lora_domains.report.report import Benchmark, Evaluation
from lora_domains.tasks import Classification
from lora_domains.training.fit import check_launch, training_dataset


class DomainModel:
    """A frozen base with the adapters loaded on it.

    It is called like the model it wraps, ``model(input_ids=…).logits``, with the adapter that
    ``using`` selects. Adapters are saved in the folder ``out`` and found there by name.
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
        self._state_at_load = base_state(base)

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path | None = None, *, quantization: Quantization | None = None,
        dtype: str | torch.dtype | None = None, revision: str | None = None,
        device: str | torch.device | None = None, device_map: DeviceMap | None = None,
        sharded: bool = False, slots: int | None = None, out: str | Path = "adapters",
        display: Display | None = None,
    ) -> Self:  # fmt: skip
        """A model on the base in a folder or on the Hub; by default on the embedded base.

        ``device_map`` spreads the base over device, memory and disk ("auto", or a place for each
        module) for inference; ``sharded`` shares it out to the processes of a launch, all of which
        make the same calls.
        ``slots`` limits the number of adapters on the device at once (see ``Bank``). Raises
        BaseModelError if the base cannot be found or loaded.
        """
        shown = display or Display(quiet=not distributed.is_main())
        with weights_bar(path_or_id is None or Path(path_or_id).exists()):
            base = load_base(
                path_or_id, revision=revision, dtype=dtype, quantization=quantization,
                device=device, device_map=device_map, sharded=sharded,
                announce=report_memory(shown, quantization, quiet=display is None),
            )  # fmt: skip
        if sharded:
            release(base.device)  # whole pieces, freed one by one
        for note in base.notes:
            shown.warn(note)
        return cls(base, slots=slots, out=out, display=shown)

    def __call__(
        self, *args: Any, domain: str | None = None,
        domains: Sequence[str | None] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """A forward pass with ``domain``, with ``domains`` row by row, or as ``using`` says."""
        batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        rows = row_domains(domain, domains, 1 if batch is None else len(batch))
        if rows is None:
            return self.base.model(*args, **kwargs)
        with self.bank.routed(rows):
            return self.base.model(*args, **kwargs)

    def __repr__(self) -> str:
        loaded = ", ".join(self.domains) or "no adapter"
        return f"<DomainModel {base_in_words(self.base)}: {loaded}>"

    def _repr_html_(self) -> str:
        return model_in_html(base_in_words(self.base), {n: self.bank[n].card for n in self.domains})

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self.bank)

    # Adapters

    def load_adapter(
        self, path: str | Path, name: str | None = None, *, revision: str | None = None
    ) -> str:
        """Load an adapter saved here or by plain PEFT; ``path`` is as in ``find_adapter``.

        Returns its name; one of this name is replaced. After an AdapterError nothing has changed.
        """
        adapter = load_adapter(find_adapter(path, self.out, revision=revision), self.base, name)
        self.bank.add(adapter)
        for note in adapter.notes:
            self.display.warn(note)
        return adapter.name

    def unload(self, name: str) -> None:
        """Unload an adapter. Its folder stays, and calls in progress finish with it."""
        self.bank.remove(name)

    def merged(self, name: str, *, dtype: str | torch.dtype | None = None) -> Any:
        """A plain transformers model: the base with the loaded adapter ``name`` merged into it.

        The base is loaded again, unquantised, in its own dtype or ``dtype``. The largest change of
        a logit by merging is shown. Raises UsageError, BaseModelError or AdapterError.
        """
        merged = merge(self.bank, name, dtype)
        self.display.stage("merged", None, None, str(merged))
        return merged.model

    def export(
        self, name: str, folder: str | Path, *, dtype: str | torch.dtype | None = None
    ) -> None:
        """Save the ``merged`` model with its tokenizer, as transformers loads it.

        Also raises AdapterError if ``folder`` contains anything but a merged model.
        """
        merged = export(self.bank, name, Path(folder), dtype)
        self.display.stage("merged", None, None, str(merged))
        self.display.line(f"Saved: {folder}")

    def using(self, name: str | None) -> AbstractContextManager[Self]:
        """Use the adapter ``name`` in all calls inside the block; None is the base.

        Safe across threads and tasks, when nested and on exceptions. A thread started inside the
        block starts with the base and needs a block of its own. In a generator, name the domain in
        each call, since the block would stay active for the caller between values. Raises
        UsageError for a name that is not loaded, and for blocks left out of order.
        """
        return entered(self.base.model, self.bank.route(name), self)

    # Training

    @overload
    def fit(self, domain: Sequence[Domain], **options: Any) -> list[Card]: ...
    @overload
    def fit(self, domain: Domain | Source, *, seeds: int, **options: Any) -> list[Card]: ...
    @overload
    def fit(self, domain: Domain | Source, **options: Any) -> Card | None: ...

    def fit(
        self, domain: Domain | Source | Sequence[Domain], *,
        name: str | None = None, text: str | tuple[str, ...] = "text", label: str = "label",
        positive: str | None = None, head: bool = False,
        validation: Source | None = None, test: Source | None = None,
        init_from: str | Path | None = None, resume: bool = False, tracker: str | None = None,
        dry_run: bool = False, no_evaluate: bool = False, suite: Suite | None = None,
        prepared: Prepared | Sequence[Prepared] | None = None, together: int | None = None,
        seeds: int | None = None, sweep: Mapping[str, Sequence[Any]] | None = None,
        **settings: Any,
    ) -> Card | list[Card] | None:  # fmt: skip
        """Train, save and load an adapter for a domain, or for rows with a text and a label.

        Several domains are trained together, in passes that their rows share, or one after another
        where that is faster; ``together`` says how many at a time. ``prepared`` are then lists.

        ``seeds`` trains a domain from its seed and the next ones: NAME, NAME-seed1, …, whose cards
        hold the spread on the validation rows. ``sweep`` has values of settings by their names,
        ``{"rank": [8, 16], "lr": [1e-4, 3e-4]}``: all combinations are trained, the best on the
        validation rows is saved, and its card names the others (``training["chosen_among"]``).

        ``init_from`` is a saved adapter from which to continue. ``resume`` continues an interrupted
        run. ``tracker`` is tensorboard, wandb or trackio. ``dry_run`` checks the rows, shows the
        plan and estimates memory and time: of training, and of evaluating test rows and ``suite``,
        or validation rows with ``no_evaluate``. ``prepared`` are the rows if they were read.
        ``settings`` are those of a domain. A saved adapter of the same name becomes a version.

        Returns the card, which has no verdict before ``evaluate``; None after a dry run. Raises
        UsageError for an unknown setting, DataError or LeakError for rows that cannot be used, and
        TrainingError; if an epoch was finished by then, the best one is saved.
        """
        task = Classification(text=text, label=label, positive=positive, head=head)
        domains, several = requested(domain, name, task, validation, test)
        check_variants(
            domains, seeds, sweep, continued=init_from is not None, together=together, **settings
        )
        check_launch(tracker, self.display)
        rows = prepared if isinstance(prepared, Sequence) else [prepared] * len(domains)
        datasets = [
            training_dataset(with_settings(one, **settings), self.base, self.out, self.display,
                             init_from=init_from, resume=resume, prepared=own)
            for one, own in zip(domains, rows, strict=True)
        ]  # fmt: skip
        datasets = datasets if seeds is None else seed_datasets(datasets[0], seeds)
        self._datasets |= {dataset.domain.name: dataset for dataset in datasets}
        train = partial(fit_sweep, sweep=sweep) if sweep else fit_all
        timed = partial(self._seconds, suite, no_evaluate) if dry_run else None
        cards = train(
            self.bank, datasets, self.out, self.display,
            resume=resume, tracker=tracker, together=together, dry_run=timed,
        )  # fmt: skip
        for card in cards:  # load what was saved, so that this is what gets evaluated
            self.load_adapter(self.out / card.adapter.domain)
        if seeds is not None and cards:
            cards = score_seeds(self.bank, datasets, self.out, self.display)
        return cards if several or seeds else next(iter(cards), None)

    def dataset(
        self, domain: Domain | str, prepared: Prepared | None = None, *, test: Source | None = None
    ) -> Dataset:
        """The rows of a domain as tokenised for its base, with ``test`` as other test rows.

        Its name will do if this model fitted it, or loaded an adapter whose card leads to its rows.
        ``prepared`` are those if they were read. Raises UsageError, DataError or LeakError.
        """
        name = domain if isinstance(domain, str) else domain.name
        known, cards = self._datasets.get(name), (self.bank[one].card for one in self.domains)
        if isinstance(domain, str) and known is not None and test is None:
            return known
        own = next((card for card in cards if card and card.adapter.domain == name), None)
        domain = declared_domain(domain, known, own, test)
        if name in self.bank:
            labels = prepared.task.labels if prepared is not None else None
            check_labels(self.bank[name], domain.task, labels or ())
        domain = replace(domain, task=as_trained(own, domain.task))
        if dataset := known and known.for_domain(domain):
            return dataset
        dataset = load_dataset(domain, self.base, self.display, prepared)
        if test is not None:  # the domain keeps its own rows
            return replace(dataset, parent=known.parent if known else None)
        self._datasets[name] = dataset
        return dataset

    # Evaluation

    def evaluate(
        self, domain: Domain | str, *, test: Source | None = None,
        suite: Suite | str | None = None, prepared: Prepared | None = None,
    ) -> Evaluation:  # fmt: skip
        """Score base, adapter and baselines on the domain's test rows and on general questions.

        ``test`` are other test rows than the domain's: a table, a list of rows, or a file. An
        adapter's name will do for a domain whose rows are in files (see ``dataset``). ``suite`` is
        by default that of the adapter's last evaluation, or ``default_suite``. Writes scores, gates
        and verdict into the adapter's card. One of plain PEFT must be loaded under the domain's
        name; its card is saved in ``out``. Raises AdapterError without an adapter of the domain,
        UsageError for other rows than in its training.
        """
        name = domain if isinstance(domain, str) else domain.name
        if name not in self.bank:
            self.load_adapter(self.out / name)
        dataset = self.dataset(domain, prepared, test=test)
        asked = suites.asked(self.bank, suite, dataset.domain.name)
        card = evaluate(self.bank, dataset, asked, self.out, self.display, self._base_changed)
        return Evaluation(card)

    def benchmark(
        self, suite: Suite | str | None = None, domains: Sequence[Domain] = (),
        out: str | Path = "reports", *, show_text: bool = False,
    ) -> Benchmark:  # fmt: skip
        """Score all loaded adapters on general questions, and each on the rows of ``domains``.

        An adapter whose domain is not in ``domains`` keeps the scores of its last evaluation.
        Scores are stored under ``out``, so that a stopped run continues. ``show_text`` includes the
        text of wrongly answered rows where a domain allows it. Raises UsageError if no adapter is
        loaded, or one was never evaluated.
        """
        asked, datasets = suites.asked(self.bank, suite), [self.dataset(one) for one in domains]
        return benchmark(
            self.bank, datasets, asked, self.out, self.display, self._base_changed,
            reports=Path(out), show_text=show_text,
        )  # fmt: skip

    def _seconds(self, suite: Suite | None, untested: bool, dataset: Dataset, name: str) -> float:
        test = bool(dataset.test) and not untested
        asked = suites.asked(self.bank, suite) if test else Suite("none", ())
        return evaluation_seconds(self.bank, dataset, asked, name, self._base_changed, test=test)

    def _base_changed(self) -> bool:
        return base_state(self.base) != self._state_at_load

    # Use

    @overload
    def predict(self, texts: Iterator[Any], *args: Any, **options: Any) -> Iterator[Answer]: ...
    @overload
    def predict(self, texts: Any, *args: Any, **options: Any) -> Predictions[Answer]: ...

    def predict(
        self, texts: Any, domain: str | None = None, *, domains: Any = None,
        refer_below: float = 0.0,
    ) -> Any:  # fmt: skip
        """The label and its probability, the labels, or the generated answer of each text.

        Texts are strings, or rows with the columns of the domain's prompt, also in pandas, whose
        index is kept. ``domain`` is a loaded adapter, ``domains`` one for each text; otherwise
        ``using`` decides. A label less probable than ``refer_below`` becomes ``refer``. The
        answers to texts without a length (a generator) are an iterator, which reads them in blocks.
        """
        answer = partial(predict, self.bank, refer_below=refer_below, warn=self.display.warn)
        if not isinstance(texts, Sized):
            pairs = with_domains(self.bank, texts, domain, domains)
            return chain.from_iterable(in_blocks(answer, pairs))
        many = [texts] if isinstance(texts, str | Mapping) else list(in_memory(texts))
        names = text_domains(self.bank, domain, domains, len(many))
        return Predictions(answer(many, names), index_of(texts))

    def generate(
        self,
        prompts: str | Sequence[str],
        domain: str | None = None,
        *,
        domains: Sequence[str | None] | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Continue one or several prompts, greedily unless ``options`` of transformers differ.

        At most 64 tokens are generated unless ``max_new_tokens`` says otherwise.
        ``domain`` is a loaded adapter and ``domains`` one for each prompt (None is the base);
        without either, ``using`` decides. Sorting by domain affects sampling only.
        """
        check_generates(self.base)
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = row_domains(domain, domains, len(many))
        texts = continuations(self.bank, many, rows, max_new_tokens=max_new_tokens, **options)
        # With num_return_sequences one prompt has several continuations.
        return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts

    def stream(
        self,
        prompt: str,
        domain: str | None = None,
        *,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The text of ``generate`` in pieces, as they are generated.

        The adapter is the one in use when this is called, wherever the pieces are read.
        """
        return stream(self.bank, prompt, domain, max_new_tokens=max_new_tokens, **options)
