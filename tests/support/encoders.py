"""Random encoders of BERT's, DistilBERT's and RoBERTa's shape, with a small WordPiece tokenizer."""

import json
from pathlib import Path
from typing import Any

from conftest import WORDS
from support.architectures import tiny_config

from lora_domains.modeling.base_check import ENCODERS

SMALL = {"vocab_size": 300, "max_position_embeddings": 64, "eos_token_id": 3}
KINDS = ENCODERS
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True}  # fmt: skip
"""What the folder of a sentence encoder says of its pooling."""


def config_of(kind: str) -> Any:
    return tiny_config(kind, **SMALL)


def make_encoder(folder: Path, kind: str = "distilbert", *, saved: str = "masked") -> Path:
    """Save a random encoder; ``saved``: with its "masked" head, a "classifier", or "bare"."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    kinds = {"masked": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification,
             "bare": AutoModel}  # fmt: skip
    torch.manual_seed(0)
    model = kinds[saved].from_config(config_of(kind))
    with torch.no_grad():
        # As drawn (deviation .02) every text looks alike; a trained encoder tells words apart.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "position" not in name and "type" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_sentence_encoder(folder: Path, kind: str = "bert", **pooling: Any) -> Path:
    make_encoder(folder, kind, saved="bare")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or MEAN))
    return folder


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
             "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
    # Written out: WordPieceTrainer numbers the pieces of each process in another order.
    letters = sorted(set(WORDS) - {" "})
    pieces = [*names.values(), *letters, *(f"##{one}" for one in letters), *WORDS.split()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(word, tokenizer.token_to_id(word)) for word in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
