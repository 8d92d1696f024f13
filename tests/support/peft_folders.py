"""Plain PEFT, the oracle: its adapters, and what it computes with an adapter folder."""

from pathlib import Path
from typing import Any

import torch
from support.adapters import IDS


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def peft_logits(base_folder: Path, folder: Path) -> torch.Tensor:
    """Logits of plain PEFT with an adapter folder."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain(base_folder), folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def peft_saved(base_folder: Path, folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter that plain PEFT made and saved, with random B; its folder and logits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(**{"task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(plain(base_folder), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=IDS).logits
