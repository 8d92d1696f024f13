"""``DomainModel``: the one object people meet, thin over the files that do the work."""

import io
import json
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from lora_domains import __version__
from lora_domains.adapter import rewrite_card, save_adapter
from lora_domains.bank import Bank
from lora_domains.base import Base, Quantization, load_base
from lora_domains.benchmark import Field, Scorer, Store, measure
from lora_domains.data import Data, Prepared, prepare
from lora_domains.display import Display
from lora_domains.domain import Domain, as_record, with_settings
from lora_domains.encoding import Encoder, Item, check_choices, supervised
from lora_domains.errors import AdapterError, UsageError
from lora_domains.evaluation import score_items, unanswered
from lora_domains.leaks import Leaks, find_leaks
from lora_domains.loading import find_adapter, load_adapter
from lora_domains.reading import Source
from lora_domains.report import SCHEMA, figures, markdown, read_card
from lora_domains.routing import entered
from lora_domains.scoring import choice_logprobs, generate_in_chunks, renormalise
from lora_domains.serving import by_domain, continued, each_row, streamed
from lora_domains.suites import Suite, embedded, load_suite
from lora_domains.tasks import Classification, Example, Row, Task, task_from_record
from lora_domains.trace import Trace, trace
from lora_domains.training import Plan, Run, Trained, make_plan

LONGEST = 2048
"""Tokens of a row at most, unless a domain's ``max_length`` says otherwise."""


@dataclass(frozen=True)
class Prediction:
    """One label with its probability, and those of the others."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """An adapter's card after it was measured; printing it shows the tables and the verdict."""

    card: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.card["adapters"][0]
        return entry

    @property
    def verdict(self) -> str:
        return str(self.entry["verdict"])

    def show(self, display: Display) -> None:
        display.scores(self.entry)
        display.general(self.entry)
        display.gates(self.entry)

    def __str__(self) -> str:
        text = io.StringIO()
        self.show(Display(console=Console(file=text, width=120)))
        return text.getvalue()


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measured: a report of several adapters, and the items it is made from."""

    report: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]

    @property
    def verdict(self) -> str:
        """The worst verdict among the adapters."""
        found = {entry["verdict"] for entry in self.report["adapters"]}
        return next(v for v in ("fail", "inconclusive", "pass") if v in found)

    def save(self, out: str | Path) -> Path:
        """Write the report and its items into the folder ``out``; returns it."""
        folder = Path(out)
        (folder / "items").mkdir(parents=True, exist_ok=True)
        for name, items in self.items.items():
            lines = "".join(json.dumps(item) + "\n" for item in items)
            (folder / "items" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.report, indent=1), encoding="utf-8")
        return folder


@dataclass(frozen=True)
class _Ready:
    """A domain's rows, read, checked and encoded for this base."""

    domain: Domain
    prepared: Prepared
    encoder: Encoder
    train: list[Item]
    validation: list[Item]


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
        self.display = display or Display(quiet=not _main_process())
        self._ready: dict[str, _Ready] = {}
        self._witness = _witness(base)

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
        base = load_base(
            path_or_id, revision=revision, dtype=dtype, quantization=quantization, device=device
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
        rows = each_row(domain, domains, 1 if batch is None else len(batch))
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

    def reload(self, name: str) -> str:
        """Read a resident adapter from its folder again; calls in flight end with the one before.

        Raises what ``load_adapter`` does, and then the adapter stays as it was.
        """
        path = self.bank[name].path
        if path is None:
            raise UsageError(
                where=name,
                expected="an adapter that was loaded from a folder",
                found="one that was put into the bank from memory",
                mend="Save it, and load it with load_adapter.",
            )
        return self.load_adapter(path, name)

    def unload(self, name: str) -> None:
        """Take a resident adapter out; its folder stays, and calls in flight go on with it."""
        self.bank.remove(name)

    @contextmanager
    def using(self, name: str | None) -> Iterator[Self]:
        """Serve every call inside by the adapter ``name``; None is the base.

        Safe across threads and tasks, nested and on exceptions. A thread started inside begins
        at the base: enter ``using`` there. Inside a generator that yields, name the domain in each
        call instead: what ``using`` says would hold for whoever is given the value. Raises
        UsageError for a name that is not resident, and for blocks left out of order.
        """
        with self.bank.routed(name):
            yield self

    # Training

    def fit(
        self,
        domain: Domain | Source,
        *,
        name: str | None = None,
        text: str | tuple[str, ...] = "text",
        label: str = "label",
        positive: str | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        resume: bool = False,
        dry_run: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Train an adapter for a domain, or for rows with a text and a label; saves and loads it.

        ``settings`` are those of a domain (``epochs=3``, ``lr=…``, ``rank=…``); unknown names
        raise UsageError. Returns the card, which has no verdict before ``evaluate``. Raises
        DataError, LeakError or TrainingError; the adapter saved before is untouched then.
        """
        if not isinstance(domain, Domain):
            if name is None:
                raise UsageError(
                    expected="a name for the adapter",
                    found="rows without one",
                    mend="Call fit(rows, name='spam').",
                )
            task = Classification(text=text, label=label, positive=positive)
            domain = Domain(name, task, Data(domain, validation, test))
        domain = with_settings(domain, **settings)
        ready = self._read(domain)
        domain = ready.domain  # its labels are known now
        plan = make_plan(self.base, domain, ready.train)
        for reason in plan.reasons:
            self.display.stage("plan", None, None, reason)
        for warning in plan.warnings:
            self.display.warn(warning)
        if dry_run:
            self.display.line(
                f"Dry run: {plan.epochs} epochs of {plan.steps_per_epoch} steps would follow; "
                "nothing was trained or written."
            )
            return {}
        if self._checkpoint(domain).exists() and not resume:
            self.display.warn("an unfinished run is replaced; --resume would have continued it.")
        run = self._run(ready, plan)
        run.on_best = lambda trained: self._save(ready, trained)
        trained = run.fit(resume=resume)
        card = self._save(ready, trained)
        training = card["adapters"][0]["training"]
        self.display.stage(
            "fine-tuned",
            len(ready.train),
            None,
            f"{training['epochs']} epochs, {training['steps']} steps, {training['seconds']:.0f} s "
            f"({training['tokens_per_second']:.0f} tokens/s); epoch {training['best_epoch']} kept",
        )
        # What is measured from here on is what lies on disk.
        self.load_adapter(self.out / domain.name)
        return card

    def _read(self, domain: Domain) -> _Ready:
        """Rows read, checked, split and encoded; shown stage by stage."""
        prepared = prepare(domain.task, domain.data, domain.training.seed)
        for stage in prepared.stages:
            self.display.stage(stage.name, stage.rows_in, stage.rows_out, stage.what)
        limit = domain.training.max_length or min(self.base.context, LONGEST)
        encoder = Encoder(self.base.tokenizer, limit)
        domain = replace(domain, task=prepared.task)
        if isinstance(prepared.task, Classification):
            where = f"domain {domain.name!r}, column {prepared.task.label!r}"
            check_choices(encoder, prepared.task.choices, where)
        train = encoder.encode_all(prepared.train)
        validation = encoder.encode_all(prepared.validation)
        ledger = supervised(prepared.ledger, train)
        prepared = replace(prepared, ledger=ledger)
        splits = {n: len(getattr(prepared, n)) for n in ("train", "validation", "test")}
        self.display.ledger(asdict(ledger), splits)
        if ledger.truncated:
            self.display.warn(
                f"{ledger.truncated} of {len(train)} training rows were longer than {limit} tokens "
                "and lost tokens from the middle of their prompt."
            )
        for warning in prepared.warnings:
            self.display.warn(warning)
        ready = _Ready(domain, prepared, encoder, train, validation)
        self._ready[domain.name] = ready
        return ready

    def _run(self, ready: _Ready, plan: Plan) -> Run:
        texts = embedded().training_texts() if ready.domain.training.kl else []
        return Run(
            self.bank,
            ready.domain,
            plan,
            ready.train,
            ready.validation,
            self._checkpoint(ready.domain),
            self.display,
            general=ready.encoder.encode_all(texts),
        )

    def _checkpoint(self, domain: Domain) -> Path:
        return self.out / f".{domain.name}.checkpoint"

    def _save(self, ready: _Ready, trained: Trained) -> dict[str, Any]:
        """Write the adapter's folder; one process writes, the others wait."""
        domain = ready.domain
        card: dict[str, Any] = {
            "schema": SCHEMA,
            "base": self.base.record(),
            "environment": environment(self.base, domain.training.seed),
            "adapters": [
                {
                    "domain": domain.name,
                    "path": domain.name,
                    "sha256": None,
                    "recipe_digest": domain.digest(),
                    "parent": None,
                    "settings": as_record(domain),
                    "data": dict(ready.prepared.digests),
                    "training": trained.record,
                    "ledger": asdict(ready.prepared.ledger),
                    "leaks": asdict(ready.prepared.leaks),
                }
            ],
        }

        def signed(sha256: str) -> dict[str, Any]:
            card["adapters"][0]["sha256"] = sha256
            return card

        if _main_process():
            save_adapter(self.out / domain.name, trained.adapter, self.base, signed, markdown, [])
        _wait()
        return read_card(self.out / domain.name)

    # Measuring

    def evaluate(self, domain: Domain | str, *, suite: Suite | None = None) -> Evaluation:
        """Base, adapter and baselines on the domain's test rows, and on general questions.

        Writes scores, gates and verdict into the adapter's card. Raises AdapterError when the
        domain has no adapter in ``out`` or in memory, LeakError when a probe is a training row.
        """
        ready = self._ready_for(domain)
        name = ready.domain.name
        if name not in self.bank:
            self.load_adapter(self.out / name)
        prepared, suite = ready.prepared, suite or embedded()
        questions = [example for _, example in suite.examples()]
        leaks = _joined(prepared.leaks, find_leaks(prepared.train, questions))
        if ready.domain.training.kl:
            held_to = suite.training_texts()
            leaks = _joined(leaks, find_leaks(held_to, [*questions, *suite.texts()]))
        scored = score_items(
            self.bank, name, prepared, ready.encoder, suite, self._key(),
            ready.domain.training.seed, self.display, ready.domain.show_text,
        )  # fmt: skip
        changed = _witness(self.base) != self._witness
        card = self.bank[name].card
        if card is None:
            raise AdapterError(
                where=name,
                expected="an adapter trained here, with a card",
                found="a folder of plain PEFT",
                mend="Its base and training rows are unknown, so it cannot be given a verdict.",
            )
        entry = card["adapters"][0]
        # How it was trained stays as it was; what it is asked and held to is today's.
        entry["settings"] |= {k: as_record(ready.domain)[k] for k in ("task", "gates")}
        entry["leaks"] = asdict(leaks)
        entry["judged"] = {
            "metric": ready.domain.task.metric,
            "labels": list(getattr(ready.domain.task, "labels", None) or ()),
            "positive": getattr(ready.domain.task, "positive", None),
            "base_changed": changed,
            "largest_move": scored.largest_move,
            "loss": ready.domain.task.loss_unit,
            "suite": suite.name,
        }
        entry.update(figures(entry, scored.items))
        path = self.bank[name].path
        if path is not None and _main_process():
            rewrite_card(path, card, markdown, scored.items)
        _wait()
        return Evaluation(card)

    def benchmark(
        self, suite: Suite | str = "embedded", domains: Sequence[Domain] = (),
        out: str | Path = "reports",
    ) -> Benchmark:  # fmt: skip
        """Every resident adapter on the same general questions, and on the rows of ``domains``.

        An adapter whose own domain is not among ``domains`` keeps the scores of its last
        evaluation. Scores are kept under ``out``, so that a run that was stopped goes on. Raises
        UsageError when no adapter is resident, or one was never evaluated.
        """
        if not self.bank:
            raise UsageError(
                expected="at least one resident adapter",
                found="none",
                mend="Load some: model.load_adapter('adapters/medical').",
            )
        suite = load_suite(suite) if isinstance(suite, str) else suite
        fields = []
        for domain in domains:
            ready = self._ready_for(domain)
            fields.append(Field(ready.domain, ready.prepared, ready.encoder))
        scorer = Scorer(self.bank, self.domains, Store(Path(out) / ".scores"), self.display)
        encoder = Encoder(self.base.tokenizer, min(self.base.context, LONGEST))
        entries, items, matrix = measure(
            scorer, suite, fields, encoder, self._key(),
            lambda: _witness(self.base) != self._witness,
        )  # fmt: skip
        report = {
            "schema": SCHEMA,
            "base": self.base.record(),
            "environment": environment(self.base, suite.seed),
            "adapters": entries,
            "matrix": matrix,
        }
        return Benchmark(report, items)

    def _ready_for(self, domain: Domain | str) -> _Ready:
        if isinstance(domain, str):
            if domain not in self._ready:
                raise UsageError(
                    expected="a domain fitted in this process, or a Domain",
                    found=repr(domain),
                    mend="Pass the Domain itself: evaluate(load_domain('recipes/medical.py')).",
                )
            return self._ready[domain]
        known = self._ready.get(domain.name)
        if known is not None and known.domain.data == domain.data:
            return known
        return self._read(domain)

    def _key(self) -> bytes:
        """The key of the rows' digests: made once per output folder, never part of an adapter."""
        path = self.out / ".digest-key"
        if not path.exists() and _main_process():
            self.out.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        _wait()
        return bytes.fromhex(path.read_text())

    # Using

    def predict(
        self,
        texts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        domain: str | None = None,
        *,
        domains: Sequence[str] | None = None,
    ) -> list[Prediction | str]:
        """Labels with probabilities (classification) or answers (generation), one per text.

        A text is a string, or a row with the columns of the domain's prompt. ``domain`` is a
        resident adapter, ``domains`` one for each text; without either, what ``using`` says.
        """
        many = [texts] if isinstance(texts, str | Mapping) else list(texts)
        route = self.bank.current()
        if domain is None and domains is None and route is not None:
            said = route.domains
            domain, domains = (said[0], None) if len(said) == 1 else (None, list(said))
        names = each_row(domain, domains, len(many))
        tasks = {name: self._task(name) for name in names or () if name is not None}
        if names is None or None in names:
            raise UsageError(
                expected="a domain to predict for",
                found="none",
                mend="Call predict(texts, domain='medical'), or inside using('medical').",
            )
        encoder = Encoder(self.base.tokenizer, min(self.base.context, LONGEST))
        asked = [tasks[name] for name in names]
        examples = [_asked(asked[i], text, i) for i, text in enumerate(many)]
        items = [encoder.encode(example) for example in unanswered(examples)]
        found: dict[int, Prediction | str] = {}
        # Classes are scored, answers are written: one batch for each, and for each length.
        for most in dict.fromkeys(map(_tokens_to_write, asked)):
            rows = [row for row, task in enumerate(asked) if _tokens_to_write(task) == most]

            def answer(part: list[int], rows: list[int] = rows, most: int = most) -> list[Any]:
                picked = [items[rows[i]] for i in part]
                if most:
                    return self._answers(picked, most)
                return self._labels(picked, [asked[rows[i]] for i in part])

            of_rows = by_domain(self.bank, [names[row] for row in rows], len(rows), answer)
            found |= dict(zip(rows, of_rows, strict=True))
        return [found[row] for row in range(len(many))]

    def _labels(self, items: list[Item], tasks: list[Task]) -> list[Prediction]:
        found = []
        scores = choice_logprobs(self.base.model, items, self.base.tokenizer.pad_token_id)
        for row, task in zip(scores, tasks, strict=True):
            labels = getattr(task, "labels", None) or ()
            shares = [float(p) for p in torch.tensor(renormalise(row)).exp()]
            best = max(range(len(shares)), key=shares.__getitem__)
            found.append(
                Prediction(labels[best], shares[best], dict(zip(labels, shares, strict=True)))
            )
        return found

    def _answers(self, items: list[Item], most: int) -> list[str]:
        texts = generate_in_chunks(self.base.model, self.base.tokenizer, items, most)
        return [text.strip() for text in texts]

    def trace(self, text: str | Mapping[str, Any], domain: str) -> Trace:
        """One text through base and the adapter ``domain``: tokens, probabilities, layers.

        ``text`` is a string, or a row with the columns of the domain's prompt. The trace holds it:
        show it (``display.trace``), do not save it.
        """
        task = self._task(domain)
        encoder = Encoder(self.base.tokenizer, min(self.base.context, LONGEST))
        (example,) = unanswered([_asked(task, text, 0)])
        return trace(self.bank, domain, task, example, encoder)

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
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = each_row(domain, domains, len(many))
        texts = continued(self.bank, many, rows, max_new_tokens=max_new_tokens, **options)
        # num_return_sequences gives several for one prompt.
        return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts

    def stream(
        self, prompt: str, domain: str | None = None, *, max_new_tokens: int = 64, **options: Any
    ) -> Iterator[str]:
        """The text that ``generate`` would give, piece by piece as it is written.

        It is served by what was said when this was called, wherever it is read.
        """
        return streamed(self.bank, prompt, domain, max_new_tokens=max_new_tokens, **options)

    def _task(self, name: str) -> Task:
        card = self.bank[name].card
        if name in self._ready:
            return self._ready[name].domain.task
        if card is None:
            raise UsageError(
                where=name,
                expected="an adapter whose card says how it is asked",
                found="a folder of plain PEFT",
                mend="Use generate() with the prompt it was trained on.",
            )
        return task_from_record(card["adapters"][0]["settings"]["task"])


def _tokens_to_write(task: Task) -> int:
    """How long an answer may be; 0 where labels are scored instead."""
    return 0 if isinstance(task, Classification) else int(getattr(task, "max_new_tokens", 64))


def _asked(task: Task, text: str | Mapping[str, Any], number: int) -> Example:
    """A text as an example of ``task``, without an answer."""
    if not hasattr(task, "unlabelled"):
        raise UsageError(
            expected="a classification or generation domain",
            found=task.kind,
            mend="Use generate() instead.",
        )
    columns = task.columns[:-1]
    if isinstance(text, str):
        if len(set(columns)) != 1:
            raise UsageError(
                expected="rows with the columns " + ", ".join(columns),
                found="a plain string",
                mend="Pass a dict for each row.",
            )
        text = {columns[0]: text}
    example: Example = task.unlabelled(Row(text, "input", number, f"input {number}"))
    return example


def _joined(one: Leaks, other: Leaks) -> Leaks:
    return Leaks(one.exact + other.exact, one.near + other.near, one.pairs + other.pairs)


def _witness(base: Base) -> tuple[str, bytes]:
    """The base's state digest and its logits on a fixed input, bit for bit."""
    length = min(16, base.context)
    ids = (torch.arange(length, device=base.device) * 7 % base.model.config.vocab_size)[None]
    with torch.no_grad(), entered(base.model, None):
        logits = base.model(input_ids=ids, use_cache=False).logits
    return base.state_digest(), logits.float().cpu().numpy().tobytes()


def environment(base: Base, seed: int) -> dict[str, Any]:
    """What a run was made with (DESIGN.md, "On disk")."""
    import accelerate
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "lora_domains": __version__,
        "device": _device_name(base.device),
        "world_size": accelerate.PartialState().num_processes,
        "seed": seed,
        "git": _git(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git() -> str | None:
    """The commit of the checkout that the working folder is in, if there is one."""
    import subprocess

    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _main_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _wait() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


__all__ = ["DomainModel", "Evaluation", "Prediction"]
