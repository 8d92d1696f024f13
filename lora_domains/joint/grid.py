"""Several runs of one domain: from several seeds, or over a grid of settings. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from lora_domains.domain import Domain, setting_types, with_settings
from lora_domains.errors import UsageError, did_you_mean, listed
from lora_domains.report.text import setting_name, setting_value
from lora_domains.schema import OTHER_FLAGS, SETTINGS

MOST_SEEDS, MOST_RUNS = 16, 64
SHARED = {
    "training.seed": "Several seeds are trained with --seeds N (seeds=N).",
    "training.max_length": "It decides how the rows are read: fit once for each value.",
    "training.gradient_checkpointing": "It changes no result, only memory and time.",
}
"""Settings of the training that runs of a sweep share, and why."""


def check_together(together: int | None) -> None:
    """Raise UsageError for a number of runs that cannot share a pass."""
    if together is not None and together < 1:
        raise _refused(
            "--together", "at least 1", str(together),
            "Leave it out: how many share a pass is then chosen.",
        )  # fmt: skip


def check_variants(
    domains: Sequence[Domain],
    seeds: int | None,
    sweep: Mapping[str, Sequence[Any]] | None,
    *,
    continued: bool = False,
    together: int | None = None,
    **settings: Any,
) -> None:
    """Raise an error for seeds or a sweep that cannot be trained, before rows are read.

    ``together`` is how many runs share a pass, ``settings`` are those that all runs have. See
    ``of_seeds`` and ``grid``.
    """
    check_together(together)
    if seeds is None and sweep is None:
        return
    flag = "--seeds" if sweep is None else "--sweep"
    if seeds is not None and sweep is not None:
        raise _refused(
            "--seeds and --sweep", "one of them", "both",
            "Sweep first; then train the settings that you chose from several seeds.",
        )  # fmt: skip
    if len(domains) > 1:
        raise _refused(flag, "one domain", f"{len(domains)} domains", "Fit each by itself.")
    domain = with_settings(domains[0], **settings)
    if seeds is not None:
        of_seeds(domain, seeds)
    if sweep is not None:
        swept = grid(domain, sweep, continued=continued)[0]
        for given in settings:
            if _full(domain, given) in swept:
                raise _refused(
                    f"--sweep {setting_name(given)}", "its values in one place",
                    "a value of its own as well", "Leave that one out, or add it to the sweep.",
                )  # fmt: skip


def of_seeds(domain: Domain, count: int) -> list[Domain]:
    """``domain`` and its copies with the next seeds, on the same rows, ``count`` in all.

    Their names end in their seeds, ``triage-seed1``. Raises UsageError for a count out of range.
    """
    if not 2 <= count <= MOST_SEEDS:
        raise UsageError(
            where="--seeds",
            expected=f"2 to {MOST_SEEDS} seeds",
            found=str(count),
            hint="Three show whether the seed matters: --seeds 3 (seeds=3).",
        )
    first, given = domain.training.seed, domain.data.seed
    data = replace(domain.data, seed=first if given is None else given)
    copies = [
        replace(with_settings(domain, seed=seed), data=data, name=_named(domain, f"-seed{seed}"))
        for seed in range(first + 1, first + count)
    ]
    return [domain, *copies]


def grid(
    domain: Domain, sweep: Mapping[str, Sequence[Any]], *, continued: bool = False
) -> list[dict[str, Any]]:
    """The settings of each run of a sweep, by names such as ``training.lr``.

    ``sweep`` has the values of each setting; the runs are all combinations. ``continued`` runs
    begin from another adapter, and have its shape. Raises UsageError for a
    setting that is unknown or the same for all runs, for values that are missing or repeated, and
    for more than ``MOST_RUNS`` runs; DomainError for a value out of range.
    """
    values: dict[str, Sequence[Any]] = {}
    for given, found in sweep.items():
        name, where = swept_name(domain, given), f"--sweep {given}"
        if name in values:
            raise _refused(where, f"{name} once", "it twice", "Name all values in one place.")
        if continued and name.startswith("lora.") and name != "lora.dropout":
            raise _refused(where, "a setting of the training", name, "An adapter that continues "
                           "from another one has its rank, scale and targets.")  # fmt: skip
        if not found or isinstance(found, str):
            raise _refused(where, "its values", "none", f"For example --sweep {given}=A,B")
        if len({repr(value) for value in found}) < len(found):
            raise _refused(where, "different values", listed(found), "Name each value once.")
        values[name] = found
    runs = prod(map(len, values.values()))
    if not 2 <= runs <= MOST_RUNS:
        raise _refused(
            "--sweep", f"2 to {MOST_RUNS} runs, of all combinations of the values", str(runs),
            "Sweep the settings that matter most, with few values; refine around the best.",
        )  # fmt: skip
    settings = [dict(zip(values, one, strict=True)) for one in product(*values.values())]
    for one in settings:
        with_settings(domain, **one)  # raises for a value out of range
    return settings


def of_grid(domain: Domain, settings: Sequence[Mapping[str, Any]]) -> list[Domain]:
    """A copy of ``domain`` for each run of a sweep; their names end in numbers, ``triage__1``."""
    return [
        replace(with_settings(domain, **one), name=_named(domain, f"__{number}"))
        for number, one in enumerate(settings, start=1)
    ]


def swept_name(domain: Domain, given: str) -> str:
    """The full name of a setting, ``training.lr`` for ``lr``; raises UsageError (see ``grid``)."""
    known, name = _known(domain), _full(domain, given)
    if name in known.values() and name not in SHARED:
        return name
    hint = did_you_mean(name, known)
    if name in {*SETTINGS, *SETTINGS.values(), *OTHER_FLAGS, *OTHER_FLAGS.values()}:
        hint = "It is the same for all runs of a sweep: fit once for each value."
    hint = SHARED.get(name, hint)
    raise _refused(
        f"--sweep {given}", "a setting of the training or of LoRA that runs may differ in",
        repr(given), hint,
    )  # fmt: skip


def _known(domain: Domain) -> dict[str, str]:
    """The settings of the training and of LoRA by their names alone."""
    names = [n for n in setting_types(domain) if n.startswith(("training.", "lora."))]
    return {setting_name(name): name for name in names}


def _full(domain: Domain, given: str) -> str:
    """``training.lr`` for ``lr``; another name as it is."""
    plain = given.strip().replace("-", "_")
    return _known(domain).get(plain, plain)


def in_words(settings: Mapping[str, Any]) -> str:
    """The settings of a run: ``rank 8, lr 0.0001``."""
    named = ((setting_name(name), setting_value(value)) for name, value in settings.items())
    return ", ".join(" ".join(pair) for pair in named)


def _named(domain: Domain, end: str) -> str:
    """The domain's name, shortened, with an ``end``; raises UsageError where that is its own."""
    name = f"{domain.name[: 64 - len(end)]}{end}"
    if name == domain.name:
        raise _refused(
            f"domain {name!r}", "a name other than those of its runs", f"one that ends in {end!r}",
            "Name it differently (--name): a run would replace the adapter of another one.",
        )  # fmt: skip
    return name


def _refused(where: str, expected: str, found: str, hint: str) -> UsageError:
    return UsageError(where=where, expected=expected, found=found, hint=hint)
