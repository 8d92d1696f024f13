"""Domains: names, settings, recipes, records and digests."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.atomic import NAME, check_name
from lora_domains.data.source import READING, Data, Hub
from lora_domains.domain import (
    Domain,
    Lora,
    Training,
    as_record,
    load_domain,
    load_domains,
    metrics_of,
    with_settings,
)
from lora_domains.errors import DomainError, UsageError
from lora_domains.tasks import (
    Chat,
    Classification,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Preference,
    Task,
    hashed_record,
)
from lora_domains.verdict.gates import GATES, Gate, Gates, Threshold, register

SECRET = "zq-hush-93"
ROWS = [{"text": SECRET, "label": "a"}, {"text": "b", "label": "b"}]


def domain(**changes: Any) -> Domain:
    return replace(Domain("medical", Classification(positive="a"), Data(ROWS)), **changes)


@pytest.mark.parametrize("name", ["medical", "a", "2nd-try_b", "x" * 64, "console", "com10"])
def test_safe_names(name: str) -> None:
    assert check_name(name) == name


UNSAFE = [
    "../x",
    "a/b",
    "a.b",
    "",
    ".",
    "-a",
    "_a",
    "a b",
    "/abs",
    "a\n",
    "a\\b",
    "é",
    "x" * 65,
    "con",
    "NUL",
    "Lpt1",
    "\u212a1",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_and_a_safe_one_suggested(name: str) -> None:
    with pytest.raises(DomainError, match="letters, digits") as caught:
        domain(name=name)
    suggested = caught.value.hint.removeprefix("Use '").removesuffix("'.")
    assert NAME.fullmatch(suggested)
    assert len(name) <= 64 or suggested == name[:64]


@given(st.text(max_size=70))
def test_a_name_is_a_single_folder(name: str) -> None:
    if NAME.fullmatch(name):
        assert Path("root", name).resolve().parent == Path("root").resolve()
        assert name.isascii()
    else:
        with pytest.raises(DomainError):
            check_name(name)


def test_settings_are_changed_in_their_part() -> None:
    changed = with_settings(domain(), epochs=3, rank=4, retention="none", overfit=0.05)
    assert (changed.training.epochs, changed.lora.rank, changed.gates.overfit) == (3, 4, 0.05)
    assert (changed.training.retention, changed.gates.retention) == ("none", 0.03)
    assert (changed.training.batch_size, changed.data) == (None, domain().data)
    assert with_settings(domain()) == domain()
    named = {"training.lr": 0.1, "gates.retention": 0.1, "task.label": "kind"}
    changed = with_settings(domain(), **named)
    assert (changed.training.lr, changed.gates.retention) == (0.1, 0.1)
    assert changed.task == Classification(positive="a", label="kind")


@pytest.mark.parametrize(("name", "meant"), [("epoch", "epochs"), ("ranks", "rank"), ("lrr", "lr")])
def test_unknown_settings_are_suggested(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean .*'{meant}'"):
        with_settings(domain(), **{name: 1})


BAD: list[tuple[str, Any]] = [
    ("rank", 0),
    ("rank", 20000),
    ("alpha", 0),
    ("dropout", 1.0),
    ("top_layers", 0),
    ("epochs", 0),
    ("lr", 0.0),
    ("lr", float("nan")),
    ("lr", 3),
    ("batch_size", 0),
    ("warmup", 1.0),
    ("patience", 0),
    ("clip", 0.0),
    ("retention", 0.0),
    ("drift", 0.0),
    ("overfit", 1.0),
    ("recall", 1.0),
    ("precision", 0.0),
    ("seed", -1),
    ("seed", 2**31),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
    ("clip", float("inf")),
    ("kl", float("inf")),
    ("max_length", 0),
    ("schedule", "square"),
    ("decay", 0.0),
    ("decay", 1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(DomainError, match=f"setting '{name}'"):
        with_settings(domain(), **{name: value})


def test_a_rate_that_decays_is_not_constant() -> None:
    with pytest.raises(DomainError, match="'schedule': expected wsd, which also decays; found 'co"):
        with_settings(domain(), schedule="constant", decay=0.1)


def test_numeric_settings_must_be_numbers() -> None:
    for name, value in (("precision", "high"), ("lr", "fast"), ("epochs", "3")):
        with pytest.raises(DomainError, match="numbers where settings are numbers"):
            with_settings(domain(), **{name: value})
    with pytest.raises(DomainError, match="between 0 and 1; found None"):
        with_settings(domain(), precision=None)
    assert with_settings(domain(), overfit=None) == domain()


def test_tasks_without_a_positive_class_have_the_default_gates() -> None:
    for task in (Classification(), Generation()):
        assert domain(task=task).gates == Gates(recall=0.80, precision=0.85)


def recipe(folder: Path, text: str, name: str = "recipe.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_load_domain_does_not_run_the_script(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "from lora_domains.domain import Domain\n"
        "from lora_domains.data.prepare import Data\n"
        "from lora_domains.tasks import Classification\n"
        "domain = Domain('spam', Classification(), Data('train.csv'))\n"
        "if __name__ == '__main__':\n    raise SystemExit(9)\n",
    )
    assert load_domain(path) == load_domain(str(path))
    assert load_domain(path).name == "spam"


def test_files_that_declare_no_domain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="no such file"):
        load_domain(tmp_path / "none.py")
    with pytest.raises(DomainError, match="a folder"):
        load_domain(tmp_path)
    with pytest.raises(DomainError, match=r"ending in '\.yaml'"):
        load_domain(recipe(tmp_path, "name: x", "recipe.yaml"))
    with pytest.raises(DomainError, match="found none"):
        load_domain(recipe(tmp_path, "x = 1"))
    with pytest.raises(DomainError, match=r"wrong\.py.*SyntaxError"):
        load_domain(recipe(tmp_path, "domain = (", "wrong.py"))
    with pytest.raises(DomainError, match="NameError: name 'nothing'"):
        load_domain(recipe(tmp_path, "domain = nothing"))
    with pytest.raises(DomainError, match="found dict"):
        load_domain(recipe(tmp_path, "domain = {}"))
    for wrong, found in (("domains = []", "none"), ("domains = [1, {}]", "int, dict")):
        with pytest.raises(DomainError, match=f"`domains = .* found {found}"):
            load_domains([recipe(tmp_path, wrong)])


# ── The metric that decides ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("task", "own", "others"),
    [
        (Classification(positive="a"), "f1", {"accuracy", "macro_f1", "balanced_accuracy", "mcc",
                                              "recall", "loss", "nats_per_token"}),
        (Classification(), "macro_f1", {"accuracy", "balanced_accuracy", "mcc", "loss"}),
        (Classification(head=True), "macro_f1", {"accuracy", "mcc", "loss"}),
        (MultipleChoice(), "accuracy", {"loss", "nats_per_token"}),
        (Generation(), "token_f1", {"exact_match", "rouge_l", "bleu", "chrf", "number_match",
                                    "nats_per_token"}),
        (Generation(judge="number"), "token_f1", {"exact_match", "number_match"}),
        (LanguageModelling(), "nats_per_token", set()),
    ],
)  # fmt: skip
def test_a_domain_chooses_among_the_metrics_of_its_task(
    task: Task, own: str, others: set[str]
) -> None:
    assert {own, *others} <= set(metrics_of(task))
    assert domain(task=task).primary_metric == own
    for name in others:
        assert domain(task=task, metric=name).primary_metric == name
        assert with_settings(domain(task=task), metric=name).primary_metric == name


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        (Classification(positive="a"), "macro_f2", "Did you mean .*'macro_f1'"),
        (Classification(), "f1", "Name the positive class"),
        (Classification(head=True), "nats_per_token", "Choose one of these"),
        (MultipleChoice(), "macro_f1", "accuracy, loss, nats_per_token"),
        (Generation(), "accuracy", "a metric of generation: token_f1, exact_match"),
        (LanguageModelling(), "accuracy", "a metric of language modelling: nats_per_token"),
    ],
)
def test_a_metric_that_the_task_cannot_give_is_refused(
    task: Task, metric: str, message: str
) -> None:
    with pytest.raises(DomainError, match=message):
        domain(task=task, metric=metric)


def test_the_digest_covers_every_setting() -> None:
    base = domain()
    others = [
        domain(name="other"),
        domain(task=Classification(positive="b")),
        domain(data=Data(ROWS, group="who")),
        domain(lora=Lora(rank=3)),
        domain(training=Training(epochs=2)),
        domain(gates=Gates(drift=0.2)),
        domain(show_text=True),
        domain(metric="mcc"),
        domain(data=Data("train.csv")),
    ]
    digests = [base.digest(), *(other.digest() for other in others)]
    assert len(set(digests)) == len(digests)
    assert base.digest() == domain().digest()


def test_the_digest_covers_neither_text_nor_folder(tmp_path: Path) -> None:
    same_number = [{"text": "other", "label": "a"}] * len(ROWS)
    assert domain().digest() == domain(data=Data(same_number)).digest()
    assert domain().digest() == domain(data=Data(tuple(ROWS))).digest()
    one, other = (domain(data=Data(tmp_path / d / "train.csv")).digest() for d in "ab")
    assert one == other
    assert len(one) == 64


DIGESTS = [
    (LanguageModelling(), "9e73d44922fd47e46e71edfd861a7730e9ce474004b5b413a735b674fc69c685"),
    (
        Classification(positive="urgent", target_recall=0.9, head=True),
        "9c832c074c135898330f3ff7b5f6293f0f0eb722457f2d01d7ef1633a7511c63",
    ),
    (
        Chat(user=("instruction", "input"), assistant="output", system="system"),
        "04210e1596c00a2d734f84edc0ab16b0a615f63d63b4e99597e35510354d1402",
    ),
    (
        Preference(tools="tools"),
        "d47edf5a2c001b2a54a4f1ccce6884b3213ee8087843c785227f875d72b8f1f5",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("task", "digest"), DIGESTS)
def test_the_digest_of_a_declaration_never_changes(task: Task, digest: str) -> None:
    """Cards, interrupted runs and versions are recognised by it."""
    pinned = Domain(
        "notes",
        task,
        Data("rows/train.csv", test=Hub("owner/set", "test", "abc"), slices=("ward",), limit=9),
        Lora(rank=4, targets=("q_proj", "v_proj")),
        Training(epochs=2, seed=3),
    )
    assert pinned.digest() == digest


def test_the_digest_of_other_gates_never_changes() -> None:
    pinned = Domain("notes", LanguageModelling(), Data("rows/train.csv"),
                    gates=Gates(retention=0.05, recall=0.9))  # fmt: skip
    assert pinned.digest() == "bf9da1e2a8ff9fcb3c7d945691351c611634685d5882ee81ab6d325d1fdd6f16"


def test_renaming_or_adding_a_threshold_changes_no_digest() -> None:
    @dataclass(frozen=True)
    class Renamed(Gates):
        divergence: float = 0.2
        renamed = {"drift": "divergence"}  # noqa: RUF012

        def record(self) -> dict[str, float]:
            return {k: v for k, v in super().record().items() if k != "drift"}

    @dataclass(frozen=True)
    class Added(Gates):
        confidence: float = 0.5

    assert Renamed().hashed() == Gates(drift=0.2).hashed()
    register(Gate("confidence", lambda _, limit: None, Threshold(0.5)))
    try:
        assert Added().hashed() == Gates().hashed()
        assert Added(confidence=0.6).hashed() == {**Gates().hashed(), "confidence": 0.6}
    finally:
        del GATES["confidence"]


def test_renaming_a_field_of_a_task_changes_no_digest() -> None:
    @dataclass(frozen=True)
    class Renamed(LanguageModelling):
        column: str = "words"
        renamed = {"text": "column"}  # noqa: RUF012

    assert hashed_record(Renamed()) == {"kind": "language_modelling", "text": "words"}


def test_renaming_a_class_changes_no_digest() -> None:
    def build(kind: Callable[[type], Any]) -> Domain:
        hub = kind(Hub)("owner/set", "test", "abc")
        data = kind(Data)(ROWS, test=hub)
        task = kind(Classification)(positive="a")
        parts = [kind(part)() for part in (Lora, Training, Gates)]
        built: Domain = kind(Domain)("medical", task, data, *parts)
        return built

    one, renamed = build(lambda kind: kind), build(lambda kind: type("Other", (kind,), {}))
    assert type(renamed.training).__name__ == "Other"
    assert renamed.digest() == one.digest()
    assert as_record(renamed) == as_record(one)


def test_every_setting_is_in_the_record() -> None:
    every = Data(ROWS, delimiter=";", encoding="cp1252", drop_empty=True, drop_long=True,
                 merge_labels=True, seed=0)  # fmt: skip
    training, gates = Training(balance="weights"), Gates(floors={"spam": 0.5})
    record = as_record(replace(domain(), data=every, training=training, gates=gates))
    for part in (every, Lora(), Training(), Gates()):
        key = type(part).__name__.lower()
        assert record[key].keys() == {f.name for f in fields(part)}
    # The judge is a program on this machine; cards name it where it judged (``judged``).
    assert {"name", "judge", *record} == {f.name for f in fields(Domain)}


def test_settings_of_reading_change_no_digest_where_they_are_not_set() -> None:
    assert not as_record(domain())["data"].keys() & set(READING)
    digests = [replace(domain(), data=replace(domain().data, **{name: "x"})).digest()
               for name in READING]  # fmt: skip
    assert len({domain().digest(), *digests}) == len(READING) + 1


def test_the_record_is_json_without_rows() -> None:
    record = as_record(domain())
    assert json.loads(json.dumps(record)) == record
    assert SECRET not in json.dumps(record)
    assert record["training"]["epochs"] is None


def test_settings_newer_than_digests_change_none_where_they_are_left_open() -> None:
    own = domain()
    assert with_settings(own, epochs=8).digest() == own.digest()
    for name, value in (("max_steps", 9), ("validate_every", 9), ("lr_ratio", 2.0),
                        ("optimizer", "adamw8bit"), ("general_cost", 0.1),
                        ("schedule", "wsd"), ("decay", 0.1)):  # fmt: skip
        assert with_settings(own, **{name: value}).digest() != own.digest()
    assert with_settings(own, dora=True).digest() != own.digest()
    assert with_settings(own, top_layers=2).digest() != own.digest()


def test_a_target_is_the_floor_of_its_gate_unless_another_is_set() -> None:
    def floors(gates: Gates, **targets: float) -> tuple[float, float]:
        made = domain(task=Classification(positive="urgent", **targets), gates=gates)
        assert as_record(made)["gates"] == made.thresholds
        return made.thresholds["recall"], made.thresholds["precision"]

    assert floors(Gates()) == (0.80, 0.85)
    assert floors(Gates(), target_recall=0.95) == (0.95, 0.85)
    assert floors(Gates(), target_recall=0.6) == (0.6, 0.85)
    assert floors(Gates(), target_precision=0.7) == (0.80, 0.7)
    assert floors(Gates(recall=0.9), target_recall=0.95) == (0.9, 0.85)
    # A domain read from a card, which has the floor, is the same declaration.
    task = Classification(positive="urgent", target_recall=0.95)
    digests = {domain(task=task, gates=Gates(recall=r)).digest() for r in (0.80, 0.95)}
    assert len(digests) == 1
    assert domain(task=task, gates=Gates(recall=0.9)).digest() not in digests
