"""Shared parts: a random base made from a config, rows to train on, the real data's folder."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from support import device
from support.bases import FOLDER as BASES

if TYPE_CHECKING:
    from support.models import Fitted

    from lora_domains.domain import Domain

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How long an example takes says something about the machine, not about the code.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("LORA_DOMAINS_DATA") or ROOT.parent / "shared" / "data")

WORDS = (
    "alpha beta gamma delta red green blue stone river cloud note triage urgent routine spam ham "
    "text label win prize call now meet later today tomorrow question answer the a is of to and"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "where the tests marked `contract` run: cpu or cuda; default: cpu"
    parser.addoption("--device", default="cpu", help=help_)


def pytest_configure(config: pytest.Config) -> None:
    try:
        device.use(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


LONG = ("test_main_job", "test_distributed", "test_checkpoints")
"""Files whose tests take minutes: begun first, so that no process ends up waiting for one."""


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if PRETRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")


def pytest_collection_finish() -> None:
    """Libraries and tests stay to the end: no collection of garbage goes through them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)  # the few new objects are looked at less often


PRETRAINED = {"smollm2", "minilm"}
"""Fixtures with a pretrained base; tests that use one are marked ``real``."""


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return _pretrained("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return _pretrained("minilm")


def _pretrained(name: str) -> Path:
    folder = BASES / name
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no {name} in {BASES}: `make bases` gets it")
    return folder


@pytest.fixture(autouse=True, scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Training reads a part of the embedded general text, and evaluation asks a few questions; see
    ``all_texts``."""
    from support.general_text import use_few_texts

    with pytest.MonkeyPatch.context() as patch:
        use_few_texts(patch)
        patch.setenv("LORA_DOMAINS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("LORA_DOMAINS_CACHE_GB", "0")  # tests that patch the base share nothing
        yield


@pytest.fixture(autouse=True, scope="session")
def no_standard_suite() -> Iterator[None]:
    """No data set of a public suite is at hand, whatever this machine has in its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_domains.probes.standard.at_hand", lambda: None)
        yield


@pytest.fixture
def own_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Causal bases write their general text; the folder in which it is kept."""
    from support.general_text import use_own_texts

    use_own_texts(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the base computes is kept; the folder."""
    monkeypatch.setenv("LORA_DOMAINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORA_DOMAINS_CACHE_GB", "1")
    return tmp_path / "cache"


@pytest.fixture
def all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reads the embedded general text, and evaluation asks the default suite, as they are
    shipped."""
    from support.general_text import use_all_texts

    use_all_texts(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def session_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A project folder for the adapters that the tests of several files share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DOMAINS_PROJECT", str(tmp_path_factory.mktemp("project")))
        yield


@pytest.fixture(autouse=True, scope="module")
def module_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A project folder for the adapters that the tests of a file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DOMAINS_PROJECT", str(tmp_path_factory.mktemp("project")))
        yield


@pytest.fixture(autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder of the test: no evaluation of another test is in its ledger."""
    folder = tmp_path_factory.mktemp("project")
    monkeypatch.setenv("LORA_DOMAINS_PROJECT", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets, one subfolder each; LORA_DOMAINS_DATA names another."""
    if not REAL.is_dir():
        pytest.skip("LORA_DOMAINS_DATA names no folder of public data sets")
    return REAL


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, width 32, context 128) and its tokenizer."""
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models read a small suite and a small general text."""
    from support.models import use_small_suite

    use_small_suite(monkeypatch)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[[str], Path]:
    """The folder of a random base of a kind: "llama", or a kind of encoder."""
    from support.encoders import make_encoder

    made = {"llama": tiny_base}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_encoder(tmp_path_factory.mktemp("encoders") / kind, kind)
        return made[kind]

    return base


@pytest.fixture(scope="session")
def gpt2_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, whose linears are Conv1D with transposed weights."""
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("bases") / "gpt2"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spam() -> "Domain":
    """A domain whose label follows from the last words of each row."""
    from support.models import clear_rows, declared

    # Seed 0 may stay on a plateau for as long, as rounding has it.
    return declared(clear_rows(), epochs=6, seed=1)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, spam: "Domain") -> "Fitted":
    """A model with the adapter ``spam``, and its evaluation; no test changes either."""
    from support.models import SUITE, model_in

    model = model_in(tmp_path_factory.mktemp("adapters"), tiny_base)
    model.fit(spam)
    return model, model.evaluate(spam, suite=SUITE)


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama and a byte-level tokenizer in ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    settings = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, secret: str = "") -> list[dict[str, Any]]:
    """Rows whose label follows from one word; no two alike. One contains ``secret``."""
    import random

    rng = random.Random(seed)
    words = WORDS.split()[:10]
    rows, seen = [], set()
    while len(rows) < count:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(4, 9)))
        if text in seen or (("alpha" in text) == ("beta" in text)):
            continue
        seen.add(text)
        rows.append({"text": text, "label": "spam" if "alpha" in text else "ham"})
    if secret:
        rows[1]["text"] += " " + secret
    return rows
