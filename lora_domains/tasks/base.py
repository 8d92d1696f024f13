"""The interface of a task, and the registry of its kinds.

A task is a frozen value that says how a row becomes a prompt and an answer, and how the answer is
scored. A kind of task is one subclass of :class:`Task` in its own file, marked with
:func:`register`; no other file asks what kind a task is.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from lora_domains.errors import DomainError, UsageError, did_you_mean, listed
from lora_domains.tasks.answers import ALWAYS, without_reasoning
from lora_domains.tasks.rows import (
    Example,
    Row,
    columns_in,
    filled,
    literal_text,
    plain_text,
    text_of,
)

LossUnit = Literal["label cross-entropy", "nats per answer token",
                   "half the squared error in standard deviations"]  # fmt: skip
ScoredBy = Literal["choices", "text", "likelihood"]
Outputs = Literal["classes", "labels", "value"]


@dataclass(frozen=True)
class Task(ABC):
    """How a row becomes an :class:`Example`, and how answers to it are scored.

    Subclasses are frozen dataclasses whose fields are what a user declares. They implement
    ``metric``, ``template``, ``answer_column`` and ``example``, and override other defaults.
    """

    kind: ClassVar[str]
    """Name of the kind, as a card stores it."""
    loss_unit: ClassVar[LossUnit] = "nats per answer token"
    trained_unit: ClassVar[str] = "nats per answer token"
    """What the loss in training is, without a head."""
    outputs: ClassVar[Outputs] = "classes"
    """What a head predicts: which one of several ``classes``, each of several ``labels`` for
    itself, or a ``value``, which is a number."""
    has_labels: ClassVar[bool] = False
    """Whether every answer is one of a fixed set of labels, shared by all rows, or several."""
    predictable: ClassVar[bool] = True
    """Whether rows without an answer can be predicted."""
    own_choices: ClassVar[bool] = False
    """Whether each row has candidate answers of its own."""
    converses: ClassVar[bool] = False
    """Whether an answer depends on several turns, rather than on one text."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of fields, which older cards have: {former: current}."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Fields that take the options "text" and "label" where they have other names."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric that decides whether an adapter gained, by its name in ``verdict.metrics``."""

    @property
    @abstractmethod
    def template(self) -> str:
        """The prompt, with ``{column}`` placeholders."""

    @property
    @abstractmethod
    def answer_column(self) -> str | None:
        """The column of the answer; None where all of the text is supervised."""

    @property
    def scored_by(self) -> ScoredBy:
        """``choices``: each candidate answer is scored; ``text``: an answer is generated and
        compared with the reference; ``likelihood``: the answer's likelihood alone."""
        return "likelihood"

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The example of a row, a pure function. Raises DataError for an unusable row."""

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that a row to predict must have."""
        return columns_in(self.template)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row with an answer must have."""
        answer = () if self.answer_column is None else (self.answer_column,)
        return (*self.input_columns, *answer)

    # ── Labels ──────────────────────────────────────────────────────────────────────────────────

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels, in order; None where unknown or where the kind has none."""
        return None

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The text of each label that is scored after the prompt, with its leading space."""
        return ()

    @property
    def positive(self) -> str | None:
        """The label whose recall and precision matter."""
        return None

    @property
    def positive_index(self) -> int | None:
        """Position of ``positive`` among ``labels``; None where no class is positive."""
        return positive_index(self.labels or (), self.positive) if self.labels else None

    @property
    def targets(self) -> dict[str, float]:
        """The recall or precision that the threshold of ``positive`` is tuned for."""
        return {}

    @property
    def tuned(self) -> bool:
        """Whether validation rows choose from which probability a label is predicted."""
        return bool(self.targets)

    @property
    def head(self) -> bool:
        """Whether a linear head over the labels is trained."""
        return False

    @property
    def head_classes(self) -> int | None:
        """Number of classes of the trained head; None without a head."""
        return len(self.labels or ()) if self.head else None

    def row_labels(self, row: Row) -> tuple[str, ...]:
        """The labels of a row as it spells them; () where it has none, or no readable ones."""
        label = (plain_text(row.values.get(self.answer_column or "")) or "").strip()
        return (label,) if label else ()

    def respelled(self, row: Row, spelling: Mapping[str, str]) -> Row:
        """``row`` with its labels replaced by what ``spelling`` has for them."""
        labels = [spelling.get(label, label) for label in self.row_labels(row)]
        return replace(row, values={**row.values, str(self.answer_column): labels[0]})

    def joined(self, labels: Sequence[str]) -> str:
        """The labels of a row as a cell of a table holds them."""
        return labels[0] if labels else ""

    def with_labels(self, rows: Sequence[Row]) -> Self:
        """This task with its labels read from ``rows`` where none are declared."""
        return self

    def with_default_labels(self, labels: tuple[str, ...] | None) -> Self:
        """This task over ``labels`` where it declares none itself."""
        return self

    # ── Numbers ─────────────────────────────────────────────────────────────────────────────────

    @property
    def scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the numbers to predict; None where unknown, or where
        nothing is measured."""
        return None

    def with_scale(self, scale: tuple[float, float] | None) -> Self:
        """This task with ``scale`` where it has none itself."""
        return self

    def fitted_to(self, examples: Sequence[Example]) -> Self:
        """This task with what it takes from its training examples."""
        return self

    # ── Chat templates ──────────────────────────────────────────────────────────────────────────

    @property
    def chat(self) -> bool | None:
        """Whether the base's chat template renders the prompts; None: where the base was trained
        on chats."""
        return False

    @property
    def thinking(self) -> bool | None:
        """Whether the assistant may think first; None: if most answers to learn have reasoning."""
        return False

    def with_chat(self, chat: bool, thinking: bool | None = False) -> Self:
        """This task with ``chat`` and ``thinking`` where it leaves them open."""
        options: dict[str, Any] = {"chat": chat, "thinking": thinking}
        return replace(self, **{k: v for k, v in options.items() if getattr(self, k) is None})

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        """The task of this kind that rows with these columns have the shape of; None where they
        have not."""
        return None

    @classmethod
    def from_cells(cls, rows: Sequence[Row], label: str) -> tuple[Self, str] | None:
        """The task of this kind that the cells of the column ``label`` are of, and why; None where
        they are not."""
        return None

    # ── Scoring ─────────────────────────────────────────────────────────────────────────────────

    @property
    def beta(self) -> float | None:
        """Where training compares two choices of a row, how closely the adapter is held to the
        base in that (DPO); None where the likelihood of an answer is learned."""
        return None

    @property
    def per_token(self) -> bool:
        """Whether the likelihood of a choice is divided by its number of tokens."""
        return False

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate at most; 0 where nothing is generated."""
        return 0

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts before which a generated answer ends."""
        return ()

    def answer_in(self, text: str) -> str:
        """The answer in a generated text, which may begin before it and go on after it."""
        return without_reasoning(text)

    def score_text(self, text: str, reference: str) -> dict[str, Any]:
        """The scores of a generated answer (``answers``); for kinds scored by ``text``."""
        raise NotImplementedError(f"{self.kind} is not scored by generated text")

    @property
    def score_keys(self) -> frozenset[str]:
        """What is known of each scored row; a metric needs its ``scores`` to be among them.

        ``inference.scores`` describes them; ``target`` is the index of the correct choice.
        """
        if self.scored_by == "choices":
            keys = {"target", "prediction", "confidence", "nll", "brier"}
            return frozenset(keys if self.head else keys | {"nats", "tokens"})
        answer = ALWAYS | {"number", "judge"} if self.scored_by == "text" else frozenset[str]()
        return answer | {"nats", "tokens"}

    def unlabelled(self, row: Row) -> Example:
        """The example of a row to predict, which needs no answer."""
        prompt, text = filled(self.template, row)
        return Example(
            row.id, prompt, "", self.label_texts, place=row.place, text=text,
            literal=literal_text(self.template), whole=bool(self.label_texts),
            messages=self.turns(row),
        )  # fmt: skip

    def turns(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        """The turns before the answer to a row, for a chat template; () where it has none."""
        return ()

    def check_predictable(self) -> None:
        """Raise UsageError where rows of this kind cannot be predicted."""
        if not self.predictable:
            raise UsageError(
                expected="a kind of task that answers rows",
                found=self.kind,
                hint="Serve it, or use generate() instead.",
            )

    def to_predict(self, text: str | Mapping[str, Any], number: int) -> Example:
        """The example of a text, or of a row's values, to predict.

        Raises UsageError where this kind cannot predict, or for a text where several columns are
        needed, and DataError for an unusable row.
        """
        self.check_predictable()
        columns = self.input_columns
        if isinstance(text, str):
            if len(set(columns)) != 1:
                raise UsageError(
                    expected="rows with the columns " + ", ".join(columns),
                    found="a plain string",
                    hint="Give the columns of each row, as a dict or as JSON.",
                )
            text = {columns[0]: text}
        row = Row(text, "input", number, f"input {number}")
        for column in columns:
            if column not in row.values:
                text_of(row, column)  # raises
        return self.unlabelled(row)

    def to_answer(self, messages: Sequence[Mapping[str, Any]]) -> Example:
        """The example of a conversation to continue, by default of one text of the user.

        Raises UsageError for a longer one, and what ``to_predict`` raises.
        """
        if [message["role"] for message in messages] != ["user"]:
            raise UsageError(
                where="messages",
                expected="one message of the user, since this adapter answers texts",
                found="roles " + listed(message["role"] for message in messages),
                hint="Send the text alone.",
            )
        return self.to_predict(messages[0]["content"], 0)

    def with_head(self) -> Self | None:
        """This task scored by a head, which encoders need; None for kinds that have none."""
        return None

    def with_options(self, **options: Any) -> Self:
        """This task with fields replaced. Raises UsageError where the kind lacks one of them."""
        options = {self.aliases.get(name, name): value for name, value in options.items()}
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise UsageError(
                    where=f"setting task.{name}",
                    expected=f"a setting of a {self.kind.replace('_', ' ')} task",
                    found=repr(name),
                    hint=did_you_mean(name, known),
                )
        return replace(self, **options)


def positive_index(labels: Sequence[str], positive: str | None) -> int | None:
    """Position of ``positive`` among ``labels``; None where no class is positive."""
    return None if positive is None else list(labels).index(positive)


# ── The registry of kinds, and tasks in cards ───────────────────────────────────────────────────

KINDS: dict[str, type[Task]] = {}
"""Every registered kind, by its name."""
Kind = TypeVar("Kind", bound=type[Task])


def register(kind: Kind) -> Kind:
    """Decorate a subclass of :class:`Task` so that cards can name it.

    Raises DomainError when another class has the same ``kind``.
    """
    known = KINDS.setdefault(kind.kind, kind)
    if known is not kind:
        raise DomainError(
            where=f"task kind {kind.kind!r}",
            expected="a name that no other kind has",
            found=f"{known.__module__}.{known.__qualname__}",
            hint="Choose another name.",
        )
    return kind


def task_record(task: Task) -> dict[str, Any]:
    """The task as JSON, as a card stores it."""
    return {"kind": task.kind, **asdict(task)}


LATER = ("chat", "instruction", "generate", "thinking", "history")
"""Fields that digests are older than; they count where they say something."""


def hashed_record(task: Task) -> dict[str, Any]:
    """The task as JSON for a digest: renamed fields keep the names they had in the first digest."""
    former = {current: name for name, current in task.renamed.items()}
    record = {k: v for k, v in task_record(task).items() if v or k not in LATER}
    return {former.get(key, key): value for key, value in record.items()}


def upgraded_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an older card with the current names of fields."""
    kind = KINDS.get(str(record.get("kind")))
    renamed: Mapping[str, str] = kind.renamed if kind else {}
    # Cards without ``chat`` did not use chat templates. ``loss_unit`` follows from the kind.
    older = {"chat": False} if kind and "chat" in {field.name for field in fields(kind)} else {}
    return older | {renamed.get(k, k): v for k, v in record.items() if k != "loss_unit"}


def task_from_record(record: Mapping[str, Any]) -> Task:
    """The task that a card stores. Raises DomainError for an unknown kind, or for bad fields."""
    values = upgraded_record(record)
    kind = KINDS.get(str(values.pop("kind", None)))
    if kind is None or not values.keys() <= {field.name for field in fields(kind)}:
        raise DomainError(
            where="card",
            expected="a task of kind " + listed(sorted(KINDS), 99),
            found=str(record.get("kind")),
            hint="Update lora-domains, or import the module that registers this kind.",
        )
    # JSON has no tuples.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise DomainError(
            where="card",
            expected=f"the fields of a task of kind {kind.kind}",
            found=f"{type(error).__name__}: {error}",
            hint="Copy the card again.",
        ) from error
