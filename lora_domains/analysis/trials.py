"""Trainings on parts of a domain's rows, of which each adapter is scored and none is saved."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lora_domains.dataset import Dataset
from lora_domains.domain import with_settings
from lora_domains.model import DomainModel
from lora_domains.tokenization.encoded import EncodedRow
from lora_domains.training.fit import make_run
from lora_domains.training.loop import Trained
from lora_domains.training.plan import make_plan


class Trials:
    """Trains with the settings that a fit of the whole dataset would have."""

    def __init__(self, model: DomainModel, dataset: Dataset, suffix: str) -> None:
        self.model = model
        # Under another name, so that an interrupted run of the domain keeps its checkpoint.
        self.domain = replace(dataset.domain, name=f"{dataset.domain.name[:50]}__{suffix}")
        self.plan = make_plan(model.base, replace(dataset, domain=self.domain))
        for warning in self.plan.warnings:
            model.display.warn(warning)

    @contextmanager
    def trained(
        self, dataset: Dataset, rows: Sequence[EncodedRow], *, epochs: int, seed: int
    ) -> Iterator[Trained]:
        """An adapter trained on ``rows``, loaded inside the block.

        Its epoch is chosen on the validation rows of ``dataset``.
        """
        bank = self.model.bank
        steps = math.ceil(len(rows) / self.plan.batch_size)
        plan = replace(self.plan, epochs=epochs, steps_per_epoch=steps)
        domain = with_settings(self.domain, epochs=epochs, seed=seed)
        part = replace(dataset, domain=domain, train=list(rows))
        run = make_run(bank, part, plan, self.model.out, self.model.display)
        trained = run.fit()
        run.forget()
        bank.add(trained.adapter)
        try:
            yield trained
        finally:
            bank.remove(trained.adapter.name)
