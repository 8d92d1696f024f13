"""The script that a user would write: transformers' Trainer with PEFT, then the test rows scored.

    python benchmarks/speed/user_script.py TRAIN TEST BASE [--padding maximum] [--head]

LoRA on all linears, validation after each epoch, then the accuracy of base and adapter on the test
rows. Batches are padded to their longest row or, as in tutorials, every row to 256 tokens. It is
the peer of ``whole_run.py``, which reads the JSON that it prints. It keeps no general knowledge,
measures none, and has no baselines.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

EPOCHS, BATCH, RANK, RATE, MAXIMUM = 3, 16, 16, 3e-4, 256
Encoded = dict[str, Any]


class Encoder:
    """Rows as token ids, and their batches."""

    def __init__(self, base: str, labels: Sequence[str], *, head: bool, padding: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.labels, self.head, self.padding = labels, head, padding
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.pad = end if pad is None else pad

    def row(self, row: dict[str, str], label: str) -> Encoded:
        """``row`` with the answer ``label``: the class, or tokens after the text."""
        if self.head:
            ids = self.tokenizer(row["text"], truncation=True, max_length=MAXIMUM)["input_ids"]
            return {"input_ids": ids, "labels": self.labels.index(label)}
        prompt = f"text: {row['text']}\nlabel:"
        ids = self.tokenizer(prompt, truncation=True, max_length=MAXIMUM - 8)["input_ids"]
        answer = self.tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        answer = [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}

    def batch(self, part: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        sizes = [len(row["input_ids"]) for row in part]
        width = max(sizes) if self.padding == "longest" else MAXIMUM

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [row[name] + [value] * (width - len(row[name])) for row in part]
            return torch.tensor(rows)

        labels = torch.tensor([r["labels"] for r in part]) if self.head else padded("labels", -100)
        mask = torch.tensor([[1] * size + [0] * (width - size) for size in sizes])
        return {"input_ids": padded("input_ids", self.pad), "attention_mask": mask,
                "labels": labels}  # fmt: skip


def train(model: Any, encoder: Encoder, rows: Sequence[dict[str, str]]) -> None:
    """Three epochs on nine tenths of the rows, each validated on the others."""
    data = [encoder.row(row, row["label"]) for row in rows]
    random.Random(0).shuffle(data)
    held = min(500, len(data) // 10)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH, learning_rate=RATE, eval_strategy="epoch",
            save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False, prediction_loss_only=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=data[held:], eval_dataset=data[:held],
            data_collator=encoder.batch,
        ).train()  # fmt: skip


@torch.no_grad()
def accuracy(model: Any, encoder: Encoder, rows: Sequence[dict[str, str]]) -> float:
    """Of the likeliest label of each row."""
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        scores = []
        for label in encoder.labels[:1] if encoder.head else encoder.labels:
            batch = encoder.batch([encoder.row(row, label) for row in part])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            wanted = batch.pop("labels")
            logits = model(**batch).logits.float()
            if not encoder.head:
                logits = -torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), wanted[:, 1:], ignore_index=-100,
                    reduction="none",
                ).sum(1, keepdim=True)  # fmt: skip
            scores.append(logits)
        chosen = torch.cat(scores, 1).argmax(1).tolist()
        right += sum(encoder.labels[n] == row["label"] for n, row in zip(chosen, part, strict=True))
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("base")
    parser.add_argument("--padding", choices=("longest", "maximum"), default="longest")
    parser.add_argument("--head", action="store_true", help="classes by a head, not by their names")
    flags = parser.parse_args()
    rows, tests = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (flags.train, flags.test)
    )
    labels = sorted({row["label"] for row in [*rows, *tests]})
    encoder = Encoder(flags.base, labels, head=flags.head, padding=flags.padding)
    model: Any
    if flags.head:
        kind, size = AutoModelForSequenceClassification, {"num_labels": len(labels)}
        model = kind.from_pretrained(flags.base, **size)
    else:
        model = AutoModelForCausalLM.from_pretrained(flags.base)
    model.config.pad_token_id = encoder.pad
    model = get_peft_model(model, LoraConfig(
        task_type="SEQ_CLS" if flags.head else "CAUSAL_LM", r=RANK, lora_alpha=2 * RANK,
        target_modules="all-linear",
    ))  # fmt: skip
    train(model, encoder, rows)
    adapter = accuracy(model, encoder, tests)
    with model.disable_adapter():
        print(json.dumps({"base": accuracy(model, encoder, tests), "adapter": adapter}))


if __name__ == "__main__":
    main()
