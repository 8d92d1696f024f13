"""The base check: a base is what it claims to be, or it is refused before it is used.

``check_architecture`` reads the config before any weight is read. ``check_behaviour`` tries the
loaded model on a few tokens: a causal base must not look ahead, and padding must change nothing.
The files beside the weights must fit the model, and must not change its answers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_domains.distributed import ran_out
from lora_domains.errors import BaseModelError, UsageError, listed
from lora_domains.modeling.checkpoint import Checkpoint
from lora_domains.placement import Placement
from lora_domains.tokenization.chat_template import ChatTemplate

ENCODERS = (
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "megatron-bert", "modernbert", "mpnet", "rembert", "roberta",
    "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
"""The kinds of encoder (``config.model_type``) that can be a base."""
SHARED_POSITIONS = ("deberta", "deberta-v2")
"""Kinds whose linears also read embeddings of positions, which belong to no row of a batch."""
READS_PADDING = ("recurrent_gemma", "rwkv")
"""Causal kinds whose recurrent state runs over the padding before a text."""
CONTEXT = 2048
"""The longest input, in tokens, of a base whose config names none."""
FROM_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
"""Kinds of encoder that number the tokens of a text from the padding id on."""
TOKENS, PADDING = 9, 3
"""Tokens of the texts that are tried, and of the padding beside one of them."""
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    RuntimeError, StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What transformers and its libraries raise for files that they cannot read."""
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer_config.json",
              "special_tokens_map.json")  # fmt: skip
"""Files beside the weights that transformers reads as JSON objects; it ignores some if broken."""
HINT = "Choose another base: docs/bases.md lists the kinds that work."


def is_bidirectional(config: Any) -> bool:
    """Whether a model of ``config`` is an encoder; BERT can also be configured as a decoder."""
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def context_of(config: Any) -> int:
    """The longest input of a model of ``config``, in tokens."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    places = next((int(n) for name in names if (n := getattr(text, name, None))), CONTEXT)
    # RoBERTa's positions start after the padding id, so that many are never used.
    if text.model_type not in FROM_PADDING:
        return places
    return places - (1 if text.model_type == "mpnet" else text.pad_token_id) - 1


def experts_of(model: nn.Module) -> list[str]:
    """The names of a mixture's experts: one weight of three dimensions for all of a layer."""
    # The word "expert" is in the name of the weight, or (JetMoE) in that of its class.
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and "expert" in f"{path} {name} {type(module).__name__}".lower()
    ]


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The layers of ``model``, in the order in which a text passes them, and the name of the list.

    Raises BaseModelError where it has no such list: ALBERT's layers are one, read several times.
    """
    text = model.config.get_text_config()
    count = text.num_hidden_layers
    within = model if text is model.config else model.get_decoder()  # images have layers too
    lists = [part for part in within.modules() if isinstance(part, nn.ModuleList)]
    whole = next((part for part in lists if len(part) == count), None)
    for name, module in model.named_modules():
        if module is whole:
            return name, whole
    raise BaseModelError(
        where=type(model).__name__,
        expected=f"a list of {count} layers",
        found="none",
        hint="Leave top_layers out: adapt all layers.",
    )


def without_remote_code(error: Exception) -> str:
    """The first line of ``error``, unless it recommends to run code from the base's folder."""
    if "trust_remote_code" in str(error):
        return "one that needs Python code of its own (auto_map), which is never run"
    first, *more = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first


# ── Before the weights are read ─────────────────────────────────────────────────────────────────


def check_side_files(folder: Path, where: str) -> None:
    """Raise BaseModelError for a file beside the weights that is no JSON object."""
    for path in (folder / name for name in SIDE_FILES):
        if not path.is_file():
            continue
        try:
            found = type(json.loads(path.read_text(encoding="utf-8"))).__name__
        except (OSError, ValueError, RecursionError) as error:
            found = f"no JSON ({type(error).__name__})"
        if found != "dict":
            raise BaseModelError(
                where=f"{where}, {path.name}",
                expected="a JSON object",
                found=found,
                hint="Copy the file again from where the base comes from.",
            )


def check_placement(place: Placement, quantization: str | None, where: str) -> None:
    """Raise BaseModelError or UsageError where a base cannot be shared out or spread as wanted."""
    device_map, sharded = place.device_map, place.sharded
    name = "a device map" if device_map is not None else "--shard-base"
    if quantization is not None and (sharded or device_map is not None):
        raise BaseModelError(
            where=where,
            expected=f"a base in full precision for {name}",
            found=f"one in {quantization.removesuffix('bit')} bits",
            hint=f"Leave out {name}, or the quantisation.",
        )
    if isinstance(device_map, str) and device_map != "auto":
        raise UsageError(
            where="device map",
            expected="auto, or a place for each module: {'model.layers.3': 'disk', …}",
            found=repr(device_map),
            hint="With auto, what fits lies on the device, and the rest in memory or on the disk.",
        )
    if sharded and device_map is not None:
        raise UsageError(
            where=where,
            expected="a device map or --shard-base",
            found="both",
            hint="A device map is for one process, --shard-base for several that train.",
        )
    if sharded and place.shares == 1:
        raise UsageError(
            where="--shard-base",
            expected="several processes to share the base",
            found="one",
            hint="Start it with accelerate launch --config_file recipes/accelerate/sharded.yaml …",
        )


def check_architecture(config: Any, where: str) -> None:
    """Raise BaseModelError unless a model of ``config`` can be a base."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = config.model_type
    if is_bidirectional(config):
        return
    found = None
    # Kinds of encoder that transformers lists as causal too say whether they are decoders.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        found = f"an encoder of another kind, {kind}"
    elif getattr(config, "is_encoder_decoder", False):
        found = f"an encoder-decoder of kind {kind}"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"a model of kind {kind}, which is neither"
    elif getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        found = f"a model of kind {kind} with bidirectional attention"
    if found is not None:
        raise BaseModelError(
            where=where,
            expected=f"a causal language model, or an encoder of kind {listed(ENCODERS, 99)}",
            found=found,
            hint=HINT,
        )
    if kind in READS_PADDING:
        raise _reads_padding(kind, where)


def _reads_padding(kind: str, where: str) -> BaseModelError:
    return BaseModelError(
        where=where,
        expected="a base that reads a text alone as it does beside a longer one",
        found=f"a model of kind {kind}, whose outputs depend on the padding of a batch",
        hint=HINT,
    )


# ── The loaded model ────────────────────────────────────────────────────────────────────────────


def check_behaviour(model: Any, pad: int, quantization: str | None, where: str) -> None:
    """Raise BaseModelError when the loaded ``model`` looks ahead, reads padding or cannot run.

    Differences are compared as root mean squares, relative to the spread of the outputs. In half
    precision and in 8 bits they may be larger, because a batch takes other kernels than one text;
    in 8 bits the outliers of all rows are chosen together.
    """
    kind = model.config.model_type
    try:
        look_ahead, padding = _differences(model, pad)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        raise BaseModelError(
            where=where,
            expected="a model that reads padded token ids",
            found=f"one of kind {kind} that cannot: {(str(error).splitlines() or ['?'])[0]}",
            hint=HINT,
        ) from error
    exact = model.dtype in (torch.float32, torch.float64)
    allowed = 0.25 if quantization == "8bit" else 1e-3 if exact and not quantization else 0.1
    if not padding < float("inf"):
        raise BaseModelError(
            where=where,
            expected="finite outputs",
            found=f"NaN or infinity in {str(model.dtype).removeprefix('torch.')}",
            hint="Load it in another precision: dtype='float32' or 'bfloat16'.",
        )
    if look_ahead > allowed:
        raise BaseModelError(
            where=where,
            expected="a causal language model, whose tokens depend on earlier ones only",
            found=f"a model of kind {kind} whose last token changes the logits of earlier ones",
            hint=HINT,
        )
    if padding > allowed:
        raise _reads_padding(kind, where)


@torch.no_grad()
def _differences(model: Any, pad: int) -> tuple[float, float]:
    """How much later tokens, and the padding of a batch, change the outputs for a text.

    Looking ahead is 0 for an encoder, which does so by design.
    """
    encoder = is_bidirectional(model.config)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = [(vocabulary // 3 + 5 * n) % vocabulary for n in range(TOKENS + 1)]
    text = [token if token != pad else token - 1 for token in tokens]
    short, filler = text[: TOKENS - PADDING], [pad] * PADDING
    padded = short + filler if encoder else filler + short
    rows = [text[:TOKENS], [*text[: TOKENS - 1], text[TOKENS]], padded]
    mask = torch.tensor([[1] * TOKENS, [1] * TOKENS, [int(token != pad) for token in padded]])
    batch = _outputs(model, torch.tensor(rows), mask)
    alone = _outputs(model, torch.tensor([short]), torch.ones((1, len(short)), dtype=torch.long))[0]
    spread = float(alone.std())
    beside = batch[2, : len(short)] if encoder else batch[2, PADDING:]
    ahead = 0.0 if encoder else float((batch[0, :-1] - batch[1, :-1]).square().mean().sqrt())
    return ahead / spread, float((beside - alone).square().mean().sqrt()) / spread


def _outputs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of a causal model, the last hidden state of an encoder: (rows, tokens, width)."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    if is_bidirectional(model.config):
        state: Tensor = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return state.float()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logits: Tensor = output.logits.float()
    return logits


# ── The files beside the weights ────────────────────────────────────────────────────────────────


def load_tokenizer(checkpoint: Checkpoint, where: str, bidirectional: bool) -> Any:
    """The checkpoint's tokenizer, with a padding token.

    Raises BaseModelError when there is none, or when it lacks the special tokens that a causal
    (end of sequence) or bidirectional base ([CLS], [SEP], [PAD]) needs.
    """
    try:
        tokenizer = checkpoint.tokenizer()
    except UNREADABLE as error:
        raise BaseModelError(
            where=where,
            expected="a tokenizer beside the weights",
            found=without_remote_code(error)
            if "trust_remote_code" in str(error)
            else "none that transformers can load",
            hint="Save one there: tokenizer.save_pretrained(folder).",
        ) from error
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise BaseModelError(
            where=where,
            expected="a chat template that is text",
            found=f"one of type {type(template).__name__}",
            hint="Copy tokenizer_config.json again, or write the template to chat_template.jinja.",
        )
    if bidirectional:
        if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
            raise BaseModelError(
                where=where,
                expected="an encoder's tokenizer, with [CLS], [SEP] and [PAD]",
                found="one without them",
                hint="Save the tokenizer that the encoder was trained with.",
            )
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            where=where,
            expected="a tokenizer with an end-of-sequence token, so that answers can end",
            found="none",
            hint="Set tokenizer.eos_token and save it again.",
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any id will do; the vocabulary must not grow.
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def fit_special_tokens(model: Any, tokenizer: Any, where: str) -> None:
    """Replace a padding token without an embedding: it is masked everywhere, any other will do.

    Raises BaseModelError when another special token has none.
    """
    places = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= places:
        others = (model.config.get_text_config().pad_token_id, tokenizer.eos_token_id, 0)
        tokenizer.pad_token_id = next(n for n in others if n is not None and n < places)
    names = ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
    for name in names:
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= places:
            raise BaseModelError(
                where=where,
                expected=f"special tokens that the model's {places} embeddings hold",
                found=f"{name} {getattr(tokenizer, name)!r} with the id {number}",
                hint="Save the tokenizer that the model was trained with.",
            )


def neutral_generation(model: Any, tokenizer: Any) -> str | None:
    """Let generated text depend on the weights only, and end where the base, its chat template or
    training ends it.

    transformers fills what a call of ``generate`` leaves open from ``model.generation_config``, and
    ends an answer where the base's configs say. Where they name another special token than the
    tokenizer does, it becomes the tokenizer's end too, so that training teaches the end at which
    decoding stops; the sentence returned says so.
    """
    from transformers import GenerationConfig

    own, named = tokenizer.eos_token_id, _ends_in(model.generation_config, model.config)
    template = ChatTemplate(tokenizer)
    stops = {template.stop} if template.own and template.stop is not None else set()
    places = model.get_input_embeddings().num_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in {own, *named, *stops} if 0 <= end < places),
    )
    added = tokenizer.added_tokens_decoder
    special = [n for n in named if 0 <= n < places and n in added and added[n].special]
    if own in {*named, *stops} or not special:
        return None
    before, tokenizer.eos_token = tokenizer.eos_token, added[special[0]].content
    return (
        f"the tokenizer ends a text with {before}, the configs of the base with "
        f"{tokenizer.eos_token}: training ends answers with the latter."
    )


def answer_ends(tokenizer: Any, generation_config: Any, config: Any) -> set[int]:
    """The tokens that end an answer, as the tokenizer and the base's configs name them."""
    return {tokenizer.eos_token_id, *_ends_in(generation_config, config)}


def _ends_in(generation_config: Any, config: Any) -> list[int]:
    """The tokens with which the base's configs end a text."""
    ends: list[Any] = []
    for part in (generation_config, config.get_text_config()):
        value = getattr(part, "eos_token_id", None)
        ends += value if isinstance(value, list | tuple) else [value]
    return [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
