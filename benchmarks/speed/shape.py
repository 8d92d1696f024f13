"""The model of the speed benchmarks: a random Llama of 55 M parameters, adapters on 112 linears.

Speed does not depend on the values of weights. Both contenders read the same folders: a base and
adapters with cards, as this package saves them.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import DTYPES, Experiment

from lora_domains import DomainModel
from lora_domains.adapters.peft import new_adapter, save_adapter
from lora_domains.cli.parser import quiet_imports
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import AdapterEntry, BaseRecord, Card


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int = 512
    layers: int = 16
    heads: int = 8
    intermediate: int = 1408
    vocabulary: int = 8000
    rank: int = 16


FULL = Shape()
SMALL = Shape(hidden=64, layers=2, heads=4, intermediate=128, vocabulary=500, rank=4)


class Bench:
    """A folder with a base and adapters, from which contenders are loaded."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        self.shape = SMALL if experiment.quick else FULL
        self.base = save_base(folder / "base", self.shape)
        self._adapters = folder / "adapters"

    def adapters(self, count: int, rank: int | None = None) -> list[Path]:
        """Folders of ``count`` different adapters, all of one rank."""
        rank = rank or self.shape.rank
        self.experiment.say(f"making {count} adapters of rank {rank}")
        base = load_base(self.base, dtype=self.experiment.dtype, device="cpu")
        first = new_adapter(base, "first", Lora(targets="all-linear"), rank, 2 * rank, seed=0)
        folders = []
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            weights = {
                linear: (a.clone().normal_(std=a.shape[1] ** -0.5, generator=generator),
                         b.clone().normal_(std=0.05, generator=generator))
                for linear, (a, b) in first.weights.items()
            }  # fmt: skip
            adapter = replace(first, name=f"r{rank}-{number}", weights=weights)
            folders.append(self._adapters / adapter.name)
            save_random(folders[-1], adapter, base)
        return folders

    def ours(
        self, folders: Sequence[Path], dtype: str | None = None, **options: Any
    ) -> DomainModel:
        """Our model with an adapter from each of ``folders``, named d0, d1, …"""
        model = DomainModel.from_pretrained(
            self.base, dtype=dtype or self.experiment.dtype, device=self.experiment.device,
            display=Display(quiet=True), **options,
        )  # fmt: skip
        for number, folder in enumerate(folders):
            model.load_adapter(folder, name=f"d{number}")
        return model

    def bare(self, dtype: str | None = None) -> Any:
        """The base in plain transformers."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=DTYPES[dtype or self.experiment.dtype]
        )
        return model.to(self.experiment.device).eval().requires_grad_(False)

    def peft(self, folders: Sequence[Path], dtype: str | None = None, **options: Any) -> Any:
        """PEFT's model with the same adapters under the same names, d0 active."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            self.bare(dtype), folders[0], adapter_name="d0", **options
        )
        for number, folder in enumerate(folders[1:], start=1):
            model.load_adapter(folder, adapter_name=f"d{number}", **options)
        return model.eval()

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        """(rows, tokens) of random ids."""
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, self.shape.vocabulary, (rows, tokens), generator=generator)
        return ids.to(self.experiment.device)

    def prompts(self, rows: int, tokens: int) -> list[str]:
        """``ids`` as texts: one word is one token, and the tokenizer adds the first."""
        return [" ".join(f"w{i}" for i in row) for row in self.ids(rows, tokens - 1).tolist()]

    @property
    def settings(self) -> dict[str, Any]:
        return {"shape": self.shape.__dict__}


def save_random(folder: Path, adapter: Adapter, base: Base) -> None:
    """Save ``adapter`` with a card that holds no training."""

    def card(sha256: str) -> Card:
        entry = AdapterEntry(domain=adapter.name, path=adapter.name, sha256=sha256)
        return Card(base=BaseRecord(**base.record()), adapter=entry)

    save_adapter(folder, adapter, base, card, lambda _: "# Random\n")


@contextmanager
def bench(experiment: Experiment) -> Any:
    """A ``Bench`` in a temporary folder, without gradients."""
    quiet_imports()
    with TemporaryDirectory() as folder, torch.no_grad():
        yield Bench(Path(folder), experiment)


def decode(call: Any, ids: torch.Tensor, steps: int, prompt: int = 16) -> Any:
    """Work: ``steps`` forward passes of one token for all rows, with a prompt in the cache.

    ``call`` has the signature of a transformers model. The cache is cropped after each run, so that
    every round does the same work.
    """
    cache = call(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    token = ids[:, :1]

    def work() -> None:
        for _ in range(steps):
            call(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    return work


def save_base(folder: Path, shape: Shape) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
