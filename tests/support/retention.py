"""A retention method that the package does not have: one class, registered by its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from lora_domains.domain import Training
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.retention import GeneralTexts, Retention, register
from lora_domains.verdict.gates import Gates


@register
@dataclass(frozen=True)
class Blend(Retention):
    """General texts trained on and regularised towards the base at once."""

    name = "blend"
    rows: int
    weight: float

    @classmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        return cls(settings.general_rows, settings.kl)

    def describe(self) -> str:
        return f"{self.rows} texts, weight {self.weight:g}"

    def loss(self, general: GeneralTexts, texts: Sequence[EncodedExample]) -> Tensor:
        return self.weight * (general.kl(texts) + general.nats(texts))

    def warning(self, base: str, familiar: bool) -> str | None:
        return f"blend trains {base} on general text."

    def drift_limit(self, gates: Gates) -> float:
        return 2 * super().drift_limit(gates)
