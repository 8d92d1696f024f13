"""Generated text: files beside the weights decide nothing, and every option works or is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import strong
from support.models import model_in

from lora_domains.errors import BaseModelError, DataError, UsageError
from lora_domains.inference import choice_tree
from lora_domains.inference.choice_tree import begun, whole_prompts
from lora_domains.inference.generation import generate_in_batches
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

PROMPTS = ["the red stone", "alpha beta gamma note"]
SIDE_FILE = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "temperature": 0.6, "top_p": 0.2,
    "do_sample": True, "num_beams": 3, "min_new_tokens": 20, "max_length": 5, "top_k": 3,
    "suppress_tokens": list(range(3, 200)), "forced_eos_token_id": 2, "renormalize_logits": True,
    "exponential_decay_length_penalty": [1, 2.0], "begin_suppress_tokens": [9], "use_cache": False,
}  # fmt: skip
"""What a base can ship that would change greedy answers."""


def rewritten(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))
    return folder


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def argmax(model: DomainModel, prompt: str, count: int) -> str:
    """The greedy answer, token by token without a cache."""
    tokenizer, ids = (
        model.tokenizer,
        [1, *model.tokenizer(prompt, add_special_tokens=False).input_ids],
    )
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model.base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text


def test_greedy_answers_do_not_depend_on_the_generation_config(tmp_path: Path, copy: Path) -> None:
    plain = model_in(tmp_path, copy)
    wanted = [argmax(plain, prompt, 12) for prompt in PROMPTS]
    assert plain.generate(PROMPTS, max_new_tokens=12) == wanted
    rewritten(copy, "generation_config.json", **SIDE_FILE)
    model = model_in(tmp_path, copy)
    assert model.generate(PROMPTS, max_new_tokens=12) == wanted
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=12)) == wanted[0]


def test_a_truth_value_ends_no_answer(copy: Path) -> None:
    rewritten(copy, "generation_config.json", eos_token_id=True)
    base = load_base(copy, device="cpu")
    assert base.model.generation_config.eos_token_id == [base.tokenizer.eos_token_id]
    assert not any(isinstance(end, bool) for end in base.model.generation_config.eos_token_id)


def test_a_merged_model_keeps_the_generation_config_of_its_base(tmp_path: Path, copy: Path) -> None:
    from support.adapters import strong

    rewritten(copy, "generation_config.json", repetition_penalty=1.3)
    model = model_in(tmp_path, copy)
    model.bank.add(strong(model.base, "a"))
    assert model.merged("a").generation_config.repetition_penalty == 1.3


@pytest.mark.parametrize("stored", [7, [7, 9]])
def test_an_answer_ends_where_the_base_or_its_training_ends_it(
    tmp_path: Path, copy: Path, stored: Any
) -> None:
    """Training ends answers with the tokenizer's token; the base's config may name others."""
    rewritten(copy, "generation_config.json", eos_token_id=stored)
    rewritten(copy, "config.json", eos_token_id=11)
    model = model_in(tmp_path, copy)
    wanted = {2, 11, *([stored] if isinstance(stored, int) else stored)}
    assert set(model.base.model.generation_config.eos_token_id) == wanted
    bias = torch.zeros(400)

    def forcing(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + bias

    model.base.model.lm_head.register_forward_hook(forcing)
    for end in sorted(wanted):
        bias.zero_()[end] = 1e4
        assert model.generate("the red", max_new_tokens=5) in (
            "", model.tokenizer.decode([end], skip_special_tokens=True)
        )  # fmt: skip


def test_training_ends_answers_with_the_token_that_the_configs_name(
    tmp_path: Path, copy: Path
) -> None:
    """Decoding stops there; an end that the base never saw may be impossible to learn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copy)
    plain, end = model_in(tmp_path, copy), tokenizer.eos_token
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(copy)
    model = model_in(tmp_path, copy)
    assert model.tokenizer.eos_token == end
    assert Tokenization(model.tokenizer, 32).eos == plain.tokenizer.eos_token_id == 2
    assert set(model.base.model.generation_config.eos_token_id) == {0, 2}
    assert [note for note in model.base.notes if end in note and tokenizer.pad_token in note]
    # Only a special token: configs name ordinary ones where nobody set them.
    for name in ("config.json", "generation_config.json"):
        rewritten(copy, name, eos_token_id=11)
    model = model_in(tmp_path, copy)
    assert (model.tokenizer.eos_token_id, model.base.notes) == (0, ())


# ── Tokens without an embedding ─────────────────────────────────────────────────────────────────


def with_token(folder: Path, *plain: str, **special: Any) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"filler{n}" for n in range(400 - len(tokenizer))])
    tokenizer.add_tokens([*plain])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 401
    return folder


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path: Path, copy: Path) -> None:
    wanted = model_in(tmp_path, copy).generate(PROMPTS, max_new_tokens=6)
    model = model_in(tmp_path, with_token(copy, pad_token="[PAD]"))
    assert model.tokenizer.pad_token_id < 400
    assert model.generate(PROMPTS, max_new_tokens=6) == wanted
    card = model.fit(rows(), name="spam", epochs=1, retention="none")
    assert card is not None


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_another_special_token_without_an_embedding_is_refused(copy: Path, name: str) -> None:
    with pytest.raises(
        BaseModelError, match=rf"400 embeddings hold; found {name} '\[NEW\]' .* 400"
    ):
        load_base(with_token(copy, **{name: "[NEW]"}))


@pytest.mark.parametrize(
    ("token", "column"), [("plain", "text"), ("special", "text"), ("special", "label")]
)
def test_a_token_of_a_row_without_an_embedding_is_named(
    tmp_path: Path, copy: Path, token: str, column: str
) -> None:
    """Read as text, a special one would be trained on in silence, as letters."""
    special = {"additional_special_tokens": ["zwölf"]} if token == "special" else {}
    model = model_in(tmp_path, with_token(copy, *([] if special else ["zwölf"]), **special))
    spoiled = [{**row, column: row[column] + " zwölf"} for row in rows()]
    with pytest.raises(DataError, match=r"index \d+: .* 400 embeddings .* 'zwölf' with the id 400"):
        model.fit(spoiled, name="spam", epochs=1)
    with pytest.raises(DataError, match=r"prompt 0.*'zwölf' with the id 400"):
        model.generate("zwölf red")


def test_a_text_to_predict_may_spell_a_special_token_without_an_embedding(
    tmp_path: Path, copy: Path
) -> None:
    model = model_in(tmp_path, with_token(copy, additional_special_tokens=["zwölf"]))
    model.fit(rows(), name="spam", epochs=1, retention="none")
    assert len(model.predict(["zwölf red"], "spam")) == 1


def rows() -> list[dict[str, Any]]:
    from conftest import make_rows

    return make_rows(60)


# ── Options ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("out"), tiny_base)


def test_no_prompt_has_no_answer(model: DomainModel) -> None:
    assert model.generate([]) == []
    assert model.generate([], domains=[]) == []


def test_a_stop_string_ends_an_answer(model: DomainModel) -> None:
    whole = model.generate("the red", max_new_tokens=12)
    assert isinstance(whole, str)
    middle = whole[len(whole) // 2 :][:2]
    assert model.generate("the red", max_new_tokens=12, stop_strings=[middle]) != whole


def test_settings_of_a_generation_config_are_used(model: DomainModel) -> None:
    from transformers import GenerationConfig

    for config in (GenerationConfig(max_new_tokens=4), {"max_new_tokens": 4}):
        assert model.generate("the red", generation_config=config) == model.generate(
            "the red", max_new_tokens=4
        )
        assert model.generate("the red", generation_config=config, max_new_tokens=3) == (
            model.generate("the red", max_new_tokens=3)
        )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_length": 20}, "max_length=20, which counts the padding"),
        ({"return_dict_in_generate": True}, "return text; found return_dict_in_generate"),
        ({"output_scores": True}, "found output_scores"),
        ({"max_new_tokens": 0}, "at least 1; found 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(
    model: DomainModel, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(UsageError, match=found):
        model.generate("the red", **options)
    with pytest.raises(UsageError, match=found):
        list(model.stream("the red", **options))


def test_a_prompt_beyond_the_context_is_refused(model: DomainModel) -> None:
    long = "the red " * 100
    with pytest.raises(UsageError, match=r"context of 128 tokens; found a prompt of 2\d\d"):
        model.generate(long)
    with pytest.raises(UsageError, match="give max_new_tokens=23"):
        model.generate("the red " * 51, max_new_tokens=24)
    assert model.generate("the red " * 51, max_new_tokens=23)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_an_answer_near_the_end_of_the_context_stops_there(
    tiny_base: Path, gpt2_base: Path, positions: str
) -> None:
    base = load_base(tiny_base if positions == "rotary" else gpt2_base, device="cpu")
    lengths = [4, base.context - 3, base.context, 9]
    examples = [EncodedExample(str(n), tuple(range(3, 3 + n)), ()) for n in lengths]
    together = generate_in_batches(base.model, base.tokenizer, examples, 8)
    assert together[2] == ""
    assert together[1] == generate_in_batches(base.model, base.tokenizer, examples[1:2], 3)[0]
    for one, text in zip(examples, together, strict=True):
        assert generate_in_batches(base.model, base.tokenizer, [one], 8) == [text]


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────


def test_the_device_auto_is_the_one_of_the_process(tiny_base: Path) -> None:
    assert load_base(tiny_base, device="auto").device.type == load_base(tiny_base).device.type


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "disk"])
def test_a_device_that_is_not_there_is_refused(tiny_base: Path, device: str) -> None:
    with pytest.raises(BaseModelError, match=f"device: expected .* found '{device}'"):
        load_base(tiny_base, device=device)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_answers_after_a_shared_beginning_are_those_of_whole_prompts(
    tiny_base: Path, gpt2_base: Path, positions: str
) -> None:
    base = load_base(tiny_base if positions == "rotary" else gpt2_base, device="cpu")
    begins, room = tuple(range(5, 5 + base.context // 2)), base.context // 2
    lengths = [1, 4, 9, 17, room - 3, room, *[2] * 18]  # two reach the end of the context
    examples = [EncodedExample(str(n), (*begins, *range(9 + n, 9 + n + size)), ())
                for n, size in enumerate(lengths)]  # fmt: skip
    bank = Bank(base)
    for seed in (1, 2):
        bank.add(strong(base, f"strong {seed}", seed))
    routes = [None, "strong 1", "strong 2"] * 8
    with bank.routed(routes):
        _, beginning = begun(base.model, examples)
        assert beginning is not None
        assert len(beginning.read[0][0]) == 3
        together = generate_in_batches(base.model, base.tokenizer, examples, 8)
        with whole_prompts():
            assert together == generate_in_batches(base.model, base.tokenizer, examples, 8)
    assert together[5] == ""
    assert len(set(together)) > 3


def test_a_beginning_is_read_without_gradients(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an adapter in training, whose answers are shown after an epoch, would be kept."""
    base, enabled, read = load_base(tiny_base, device="cpu"), list[bool](), choice_tree._read

    def watched(*given: Any) -> Any:
        enabled.append(torch.is_grad_enabled())
        return read(*given)

    monkeypatch.setattr(choice_tree, "_read", watched)
    examples = [EncodedExample(str(n), (*range(5, 45), 9 + n), ()) for n in range(20)]
    assert len(generate_in_batches(base.model, base.tokenizer, examples, 2)) == 20
    assert enabled
    assert not any(enabled)
