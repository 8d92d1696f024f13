"""The models of the speed benchmarks: random Llamas, adapters on all of their linears.

Speed does not depend on the values of weights. Both contenders read the same folders: a base and
adapters with cards, as this package saves them. Without ``--shape`` the base has 55 M parameters,
112 linears and a file of weights; those of 0.5 and 7 billion are drawn on the device each time they
are loaded, since writing and reading 14 GB would take longer than what is measured.
"""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
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
from lora_domains.modeling.checkpoint import FORMATS, Checkpoint, TensorInfo
from lora_domains.modeling.lora import Adapter
from lora_domains.modeling.quantization import quantization_config
from lora_domains.report.card import AdapterEntry, BaseRecord, Card


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    hidden: int = 512
    layers: int = 16
    heads: int = 8
    intermediate: int = 1408
    vocabulary: int = 8000
    rank: int = 16
    tied: bool = True
    """Whether the output layer is the embedding."""


FULL = Shape()
SMALL = Shape(hidden=64, layers=2, heads=4, intermediate=128, vocabulary=500, rank=4)
LARGE = {
    "0.5b": Shape(hidden=1280, layers=24, heads=20, intermediate=3456, vocabulary=32000),
    "7b": Shape(hidden=4096, layers=32, heads=32, intermediate=11008, vocabulary=32000, tied=False),
}
"""By ``--shape``: 0.52 billion parameters, and the 6.74 billion of Llama 2."""
WEIGHTS = "random.json"
"""Stands in the folder of a base for weights that are drawn when it is loaded."""


class Random(Checkpoint):
    """Weights drawn from a seed, on the device and in the precision that are asked for."""

    pattern = WEIGHTS
    on_hub = False

    @cached_property
    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((self.folder / WEIGHTS).read_text())
        return settings

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(self.config())
        return {n: TensorInfo("BF16", tuple(p.shape)) for n, p in model.named_parameters()}

    def content(self, name: str) -> Iterator[bytes]:
        """What the tensor is drawn from, in place of its bytes."""
        yield f"{name} {self._settings['seed']}".encode()

    def tensor(self, name: str) -> torch.Tensor:
        return self._drawn(torch.float32)[name]

    def _drawn(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        device = self._settings["device"]
        generator = torch.Generator(device).manual_seed(self._settings["seed"])
        drawn = {}
        for name, (_, shape) in self.tensors.items():
            tensor = torch.ones(shape, dtype=dtype, device=device)
            if len(shape) > 1:
                tensor.normal_(std=0.02, generator=generator)
            drawn[name] = tensor
        return drawn

    def load(self, architecture: Any, **options: Any) -> tuple[Any, list[str]]:
        from transformers import LlamaForCausalLM

        drawn = self._drawn(options["dtype"])
        options.setdefault("device_map", {"": next(iter(drawn.values())).device})
        model, report = LlamaForCausalLM.from_pretrained(
            None, config=self.config(), state_dict=drawn, output_loading_info=True, **options
        )
        return model, list(report["missing_keys"])


FORMATS.append(Random)


def plain(base: Path, dtype: str, device: str, quantization: Any = None) -> Any:
    """The base in plain transformers, frozen; ``quantization`` is "8bit", "4bit" or None."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization:
        config = quantization_config(quantization, DTYPES[dtype])
        options |= {"quantization_config": config, "device_map": {"": device}}
    if Random.recognises(base):
        model, _ = Random(str(base), None, base).load(AutoModelForCausalLM, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, **options)
    if not quantization:
        model.to(device)
    return model.eval().requires_grad_(False)


class Bench:
    """A folder with a base and adapters, from which contenders are loaded.

    ``large`` is a name of ``LARGE``; in a trial its base is small, but drawn in the same way.
    """

    def __init__(self, folder: Path, experiment: Experiment, large: str | None = None) -> None:
        self.experiment, self.large = experiment, large
        self.shape = SMALL if experiment.quick else LARGE[large] if large else FULL
        if experiment.quick and large:
            self.shape = replace(SMALL, tied=LARGE[large].tied)
        drawn_on = experiment.device if large else None
        self.base = save_base(folder / "base", self.shape, drawn_on)
        self._adapters = folder / "adapters"

    @property
    def different(self) -> int:
        """How many different adapters are made, at most: those of a large base take 160 MB each."""
        return 4 if self.large else 16

    def adapters(self, count: int, rank: int | None = None) -> list[Path]:
        """Folders of ``count`` different adapters, all of one rank."""
        rank = rank or self.shape.rank
        self.experiment.say(f"making {count} adapters of rank {rank}")
        device = self.experiment.device if self.large else "cpu"
        base = load_base(self.base, dtype=self.experiment.dtype, device=device)
        first = new_adapter(base, "first", Lora(targets="all-linear"), rank, 2 * rank, seed=0)
        folders = []
        for number in range(count):
            generator = torch.Generator(device).manual_seed(number)

            def drawn(like: torch.Tensor, std: float, by: torch.Generator = generator) -> Any:
                return torch.empty_like(like, device=device).normal_(std=std, generator=by).cpu()

            weights = {
                linear: (drawn(a, a.shape[1] ** -0.5), drawn(b, 0.05))
                for linear, (a, b) in first.weights.items()
            }
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
        return plain(self.base, dtype or self.experiment.dtype, self.experiment.device)

    def peft(self, folders: Sequence[Path], dtype: str | None = None, **options: Any) -> Any:
        """PEFT's model with the same adapters under the same names, d0 active."""
        from peft import PeftModel

        if self.large:  # weights are not drawn before they are read
            options.setdefault("low_cpu_mem_usage", True)
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
        return {f"shape {self.large}" if self.large else "shape": self.shape.__dict__}


def save_random(folder: Path, adapter: Adapter, base: Base) -> None:
    """Save ``adapter`` with a card that holds no training."""

    def card(sha256: str) -> Card:
        entry = AdapterEntry(domain=adapter.name, path=adapter.name, sha256=sha256)
        return Card(base=BaseRecord(**base.record()), adapter=entry)

    save_adapter(folder, adapter, base, card, lambda _: "# Random\n")


@contextmanager
def bench(experiment: Experiment, large: str | None = None) -> Iterator[Bench]:
    """A ``Bench`` in a temporary folder, without gradients; its figures begin with its name."""
    quiet_imports()
    experiment.prefix = f"{large}, " if large else ""
    with TemporaryDirectory() as folder, torch.no_grad():
        yield Bench(Path(folder), experiment, large)
    gc.collect()
    if experiment.device.startswith("cuda"):
        torch.cuda.empty_cache()


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


def save_base(folder: Path, shape: Shape, drawn_on: str | None = None) -> Path:
    """Save a base; with the device ``drawn_on`` its weights are drawn when it is loaded."""
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
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    if drawn_on is None:
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        (folder / WEIGHTS).write_text(json.dumps({"seed": 0, "device": drawn_on}))
    return folder


def multiplied(shape: Shape) -> int:
    """Parameters that each token is multiplied with: all but the embedding that is looked up."""
    attention, mlp = 4 * shape.hidden**2, 3 * shape.hidden * shape.intermediate
    return shape.layers * (attention + mlp) + shape.hidden * shape.vocabulary
