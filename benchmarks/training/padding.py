"""How much of what a step reads is padding, on real rows: what packing could save.

    python benchmarks/training/padding.py --rows DIR --bases .bases    # 5 minutes on one core
    python benchmarks/training/padding.py --table                      # the stored figures

No model is called: the rows of DIR/NAME/train.jsonl are tokenised as for a training, drawn into the
batches of its first epoch, and each batch is divided into passes as a step divides it, on a CPU and
on an accelerator. Shares are of the padded tokens. *whole batches* pads each batch to its longest
row, as a loop without passes does.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "padding.json"
RUNS: dict[tuple[str, str], dict[str, Any]] = {
    ("sms_spam", "minilm"): {"label": "label"},
    ("banking77", "minilm"): {"label": "label"},
    ("pubmedqa", "minilm"): {"text": ("context", "question"), "label": "label"},
    ("sms_spam", "smollm2"): {"label": "label"},
    ("banking77", "smollm2"): {"label": "label"},
    ("pubmedqa", "smollm2"): {"text": ("context", "question"), "label": "label"},
    ("medquad", "smollm2"): {"prompt": "{question}", "answer": "answer"},
}
"""Columns by rows and base: with a head on the encoder, as text on the causal base."""
HEADS = ("minilm",)


def run(rows: str, base: str, columns: dict[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """The shares of padding in the first epoch of one training."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel, Generation
    from lora_domains.console import Display
    from lora_domains.inference.batches import micro_batches
    from lora_domains.modeling.batching import epoch_batches
    from lora_domains.tokenization.encoded import EncodedExample
    from lora_domains.training.plan import derived_batch, derived_epochs

    task = (
        Generation(**columns)
        if "answer" in columns
        else Classification(**columns, head=base in HEADS)
    )
    data = Data(str(flags.rows / rows / "train.jsonl"), drop_leaks=True)
    domain = Domain(rows, task, data)
    model = DomainModel.from_pretrained(flags.bases / base, display=Display(quiet=True))
    dataset = model.dataset(domain)
    train = [row.encoded for row in dataset.train]
    epochs, _ = derived_epochs(len(train), domain.training)
    batch, _ = derived_batch(len(train), epochs)
    batches = [[train[i] for i in part]
               for part in epoch_batches([len(row) for row in train], batch, 0, 0)]  # fmt: skip
    vocabulary = 0 if base in HEADS else model.base.vocabulary

    def passes(device: str) -> Iterator[Sequence[EncodedExample]]:
        for part in batches:
            yield from micro_batches(part, torch.device(device), vocabulary=vocabulary)

    on_cpu, on_cuda = list(passes("cpu")), list(passes("cuda"))
    return {
        "rows": rows, "base": base, "trained": len(train), "batch": batch,
        "tokens": sum(map(len, train)), "longest": max(map(len, train)),
        "cpu": padding(on_cpu), "accelerator": padding(on_cuda), "whole batches": padding(batches),
        "passes": {"cpu": round(len(on_cpu) / len(batches), 2),
                   "accelerator": round(len(on_cuda) / len(batches), 2)},
    }  # fmt: skip


def padding(parts: Iterable[Sequence[Sized]]) -> float:
    """The share of padding in ``parts``, each padded to its longest row."""
    lengths = [[len(row) for row in part] for part in parts]
    padded = sum(len(part) * max(part) for part in lengths)
    return round(1 - sum(map(sum, lengths)) / padded, 4)


def table(runs: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ("rows", "base", "tokens a row", "longest", "batch", "padding, CPU",
            "padding, accelerator", "padding, whole batches", "passes a step")  # fmt: skip
    lines: list[Any] = [head, ["---"] * len(head)]
    for one in runs:
        shares = [f"{one[key]:.1%}" for key in ("cpu", "accelerator", "whole batches")]
        passes = f"{one['passes']['cpu']:.1f}, {one['passes']['accelerator']:.1f}"
        size = f"{one['tokens'] / one['trained']:.0f}"
        lines.append([one["rows"], one["base"], size, str(one["longest"]), str(one["batch"]),
                      *shares, passes])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--bases", type=Path, default=Path(".bases"), help="folder of bases")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    if not flags.table:
        runs = [run(rows, base, columns, flags) for (rows, base), columns in RUNS.items()]
        command = "python benchmarks/training/padding.py --rows DIR --bases .bases"
        result = {"experiment": "padding", "command": command, "runs": runs}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]))


if __name__ == "__main__":
    main()
