"""One frozen base, one LoRA adapter per domain, and a verdict on what each gained and kept.

Names are imported at their first use, so that reading a card does not import torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from lora_domains.cli.recipes import run_recipe
    from lora_domains.cli.verbs.fit import run_recipes
    from lora_domains.data.source import Data, Hub
    from lora_domains.domain import Domain, Lora, Training, load_domain
    from lora_domains.errors import LoraDomainsError
    from lora_domains.model import DomainModel
    from lora_domains.tasks import (
        Chat,
        Classification,
        Generation,
        LanguageModelling,
        MultiLabel,
        MultipleChoice,
        Number,
        Preference,
    )
    from lora_domains.tasks.answers import Judge
    from lora_domains.verdict.gates import Gates

_HOMES = {
    "Chat": "tasks",
    "Classification": "tasks",
    "Data": "data.source",
    "Domain": "domain",
    "DomainModel": "model",
    "Gates": "verdict.gates",
    "Generation": "tasks",
    "Hub": "data.source",
    "Judge": "tasks.answers",
    "LanguageModelling": "tasks",
    "Lora": "domain",
    "LoraDomainsError": "errors",
    "MultiLabel": "tasks",
    "MultipleChoice": "tasks",
    "Number": "tasks",
    "Preference": "tasks",
    "Training": "domain",
    "load_domain": "domain",
    "run_recipe": "cli.recipes",
    "run_recipes": "cli.verbs.fit",
}

__all__ = [
    "Chat",
    "Classification",
    "Data",
    "Domain",
    "DomainModel",
    "Gates",
    "Generation",
    "Hub",
    "Judge",
    "LanguageModelling",
    "Lora",
    "LoraDomainsError",
    "MultiLabel",
    "MultipleChoice",
    "Number",
    "Preference",
    "Training",
    "load_domain",
    "run_recipe",
    "run_recipes",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lora-domains")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "DomainModel":
        # tqdm says so in a notebook without widgets, where this package needs none.
        warnings.filterwarnings("ignore", "IProgress not found")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
