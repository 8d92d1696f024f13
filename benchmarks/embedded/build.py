"""Train the embedded base: `python -m benchmarks.embedded.build [--seed 0] [--out DIR]`.

Readable top to bottom: corpus → tokenizer → packed tokens → Llama → probe → folder. The same
seed writes the same corpus bytes (their digest is printed); the weights differ a little from
machine to machine. About twenty minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_domains.atomic import new_folder
from lora_domains.embedded import BASE_PATH
from lora_domains.embedded.world import DOCUMENTS, general_questions, pretraining_documents

VOCABULARY = 2800
TOKENS_A_STEP = 4096
LEARNING_RATE = 4e-3
CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
}
README = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [tiny, lora-domains]
---

# The embedded base of lora_domains

A Llama of {parameters:,} parameters, trained from nothing by
`python -m benchmarks.embedded.build` on the generated world of
`lora_domains.embedded.world`: general facts, neutral labelling habits and ordinary sentences. No
third-party text was used. It exists so that adapters can be trained, compared and tested
offline in a minute. It knows its facts ({accuracy:.3f} right on {facts:,} questions of four
choices, in wordings it was not taught them in) and nothing else: do not use it for anything that
matters.

Licence: Apache-2.0. Figures, seed and data digest: `build.json`.
"""


def write_corpus(seed: int, documents: int, path: Path) -> str:
    """Write one JSON string a line; return the sha256 of the bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text in pretraining_documents(seed, documents):
            row = json.dumps(text).encode() + b"\n"
            digest.update(row)
            file.write(row)
    return digest.hexdigest()


def read_corpus(path: Path) -> Iterator[str]:
    """The documents of a corpus file, in order."""
    with path.open(encoding="utf-8") as file:
        for row in file:
            yield json.loads(row)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no user's text is lost; digits alone, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token types
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> torch.Tensor:
    """All documents as one row of ids, each begun by BOS and ended by EOS; shape [tokens]."""
    ids: list[int] = []
    eos = tokenizer.eos_token_id
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        ids += [*encoding.ids, eos]
    return torch.tensor(ids, dtype=torch.int32)


def batches(tokens: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of [16, 257] and, every eighth, [8, 513]: inputs and targets overlap by one."""
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[int, list[int]] = {256: [], 512: []}
    for step in range(steps):
        length = 512 if step % 8 == 7 else 256
        rows = TOKENS_A_STEP // length
        if len(waiting[length]) < rows:
            offset = int(torch.randint(0, length, (1,), generator=generator))
            places = torch.arange(offset, len(tokens) - length - 1, length)
            waiting[length] = places[torch.randperm(len(places), generator=generator)].tolist()
        chosen = [waiting[length].pop() for _ in range(rows)]
        yield torch.stack([tokens[s : s + length + 1] for s in chosen]).long()


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            hidden, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, seed: int, minutes: float, steps: int
) -> int:
    """Train for `steps`, with a linear decay; `minutes` bounds it. Returns the steps taken.

    Each core takes its part of the batch in a thread of its own and the gradients are added up:
    1.5 times as fast, here, as two cores sharing every small matrix product.
    """
    optims = optimizers(model)
    parameters = list(model.parameters())
    workers = min(os.cpu_count() or 1, 8)
    torch.set_num_threads(1)

    def gradients(part: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        """Summed loss of a part, divided by the tokens of the whole batch, and its gradients."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        targets = part[:, 1:].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        loss = loss / TOKENS_A_STEP
        return loss.item(), torch.autograd.grad(loss, parameters)

    began = time.monotonic()
    average = 0.0
    model.train()
    with ThreadPoolExecutor(workers) as pool:
        for step, batch in enumerate(batches(tokens, steps, seed)):
            progress = max(step / steps, (time.monotonic() - began) / (60 * minutes))
            if progress >= 1:
                steps = step
                break
            scale = min((step + 1) / 50, 1.0) * min(1.0, (1 - progress) / 0.7)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = LEARNING_RATE * scale
            parts = list(pool.map(gradients, batch.chunk(workers)))
            for parameter, *grads in zip(parameters, *(g for _, g in parts), strict=True):
                parameter.grad = torch.stack(grads).sum(0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optim in optims:
                optim.step()
            loss = sum(value for value, _ in parts)
            average = loss if step == 0 else 0.95 * average + 0.05 * loss
            if step % 50 == 0:
                rate = (step + 1) * TOKENS_A_STEP / (time.monotonic() - began)
                print(f"step {step}/{steps} loss {average:.3f} {rate:.0f} tokens/s", flush=True)
    torch.set_num_threads(workers)
    return steps


@torch.inference_mode()
def probe(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, Any]],
    batch_size: int = 256,
) -> list[bool]:
    """For each question, whether the right choice is the likeliest (summed log-probability)."""
    model.eval()
    encoded: list[tuple[int, list[int], int]] = []
    for number, row in enumerate(questions):
        prompt = tokenizer(row["question"])["input_ids"]
        for choice in row["choices"]:
            answer = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            encoded.append((number, prompt + answer, len(answer)))
    scores = torch.empty(len(encoded))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(encoded[i][1]) for i in chosen)
        ids = torch.full((len(chosen), width), int(tokenizer.pad_token_id))
        for row_number, i in enumerate(chosen):
            ids[row_number, : len(encoded[i][1])] = torch.tensor(encoded[i][1])
        # Padding on the right of a causal model needs no mask.
        logits = model(input_ids=ids).logits.float().log_softmax(-1)
        for row_number, i in enumerate(chosen):
            _, full, length = encoded[i]
            end = len(full)
            targets = ids[row_number, end - length : end]
            steps = logits[row_number, end - length - 1 : end - 1]
            scores[i] = steps.gather(-1, targets[:, None]).sum()
    right: list[bool] = []
    place = 0
    for row in questions:
        count = len(row["choices"])
        right.append(int(scores[place : place + count].argmax()) == row["answer"])
        place += count
    return right


def accuracy_by_field(questions: list[dict[str, Any]], right: list[bool]) -> dict[str, float]:
    """Share of right answers in each field."""
    fields = dict.fromkeys(row["field"] for row in questions)
    figures = {}
    for field in fields:
        hits = [r for row, r in zip(questions, right, strict=True) if row["field"] == field]
        figures[field] = round(sum(hits) / len(hits), 4)
    return figures


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out: Path
) -> None:
    """Write the folder in one step: readers never see half of it."""
    with new_folder(out) as fresh:
        _write_folder(model, tokenizer, record, fresh)


def _write_folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], fresh: Path
) -> None:
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    named = fresh / "tokenizer_config.json"
    settings = json.loads(named.read_text(encoding="utf-8"))
    # The name that every version of transformers knows.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    named.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (fresh / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    readme = README.format(
        parameters=record["parameters"],
        facts=record["facts"],
        accuracy=record["probe"]["accuracy"],
    )
    (fresh / "README.md").write_text(readme, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Build the base from nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BASE_PATH)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--minutes", type=float, default=28.0, help="bound on the training time")
    parser.add_argument("--steps", type=int, default=0, help="default: one pass of the corpus")
    parser.add_argument("--data-only", action="store_true", help="write the corpus and stop")
    options = parser.parse_args(arguments)

    began = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    corpus = options.out.with_name(f"{options.out.name}.corpus.jsonl")
    digest = write_corpus(options.seed, options.documents, corpus)
    print(f"data sha256 {digest} ({corpus.stat().st_size / 1e6:.1f} MB in {corpus})", flush=True)
    if options.data_only:
        return

    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(read_corpus(corpus))
    tokens = pack(tokenizer, read_corpus(corpus))
    corpus.unlink()
    steps = options.steps or len(tokens) // TOKENS_A_STEP
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **CONFIG,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokens):,} tokens, {parameters:,} parameters, {steps} steps", flush=True)
    taken = train(model, tokens, options.seed, options.minutes, steps)

    questions = general_questions()
    right = probe(model, tokenizer, questions)
    record = {
        "seed": options.seed,
        "data_sha256": digest,
        "documents": options.documents,
        "tokens": len(tokens),
        "parameters": parameters,
        "steps": taken,
        "seconds": round(time.monotonic() - began),
        "facts": len({(r["relation"], r["question"]) for r in questions}),
        "probe": {
            "questions": len(questions),
            "accuracy": round(sum(right) / len(right), 4),
            "fields": accuracy_by_field(questions, right),
        },
    }
    save(model, tokenizer, record, options.out)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
