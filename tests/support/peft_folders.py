"""Plain PEFT, the oracle: its adapters, and what it computes with an adapter folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support import device
from support.adapters import token_ids


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval().to(device.name)


def peft_logits(base_folder: Path, folder: Path) -> torch.Tensor:
    """Logits of plain PEFT with an adapter folder."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain(base_folder), folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids()).logits
    return found


def peft_saved(base_folder: Path, folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter that plain PEFT made and saved, with random B and magnitudes; its folder and
    logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(**{"task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(plain(base_folder), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
        if "lora_magnitude_vector" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=token_ids()).logits


def peft_trained(base_folder: Path, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """An adapter that plain PEFT and torch trained on texts and labels, without this package."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    torch.manual_seed(7)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    model = get_peft_model(plain(base_folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for start in [*range(0, len(rows), 20)] * 6:
        batch = rows[start : start + 20]
        texts = [f"text: {row['text']}\nlabel: {row['label']}" for row in batch]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        labels = encoded["input_ids"].clone()
        for row, text in enumerate(texts):
            answer = len(tokenizer(text.rsplit(" ", 1)[0])["input_ids"])
            labels[row, :answer] = -100
        labels[encoded["attention_mask"] == 0] = -100
        mask = encoded["attention_mask"]
        model(input_ids=encoded["input_ids"], attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
