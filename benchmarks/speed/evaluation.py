"""Scoring a suite with eight adapters: ours against a plain batched loop over PEFT.

    python benchmarks/speed/evaluation.py [--device cuda --dtype bfloat16] [--quick]
    python benchmarks/speed/evaluation.py --base SMOLLM2 --questions 16
    python benchmarks/speed/evaluation.py --device cuda --dtype bfloat16 --shape 0.5b 7b

The plain loop is the usual one: for the base and each adapter, a row for every question with each
of its choices, sixteen rows a batch padded to the longest, and the choice's likelihood summed from
the logits. Both score the same questions. Results are medians of interleaved rounds, and the
largest difference between the two sets of scores, absolute and relative to the score (at least 1).
The distance of both from the same loop in float64 shows the precision of the dtype. Peak memory is
measured with one and with four times the questions. Results: benchmarks/results/evaluation.json.

With ``--shape`` the questions are random words, the bases those of ``shape.py``, and the results
are stored as those of the other scripts.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import DTYPES, RESULTS, Experiment, Work, ratios, timed
from shape import Bench, bench, save_random

from lora_domains import DomainModel
from lora_domains.adapters.peft import new_adapter
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.evaluation.store import Store
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.memory import peak_memory
from lora_domains.probes.suite import Probe, Suite, embedded
from lora_domains.tasks import MultipleChoice
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.tokenization.tokenization import Tokenization

ADAPTERS, ROWS = 8, 16
QUESTIONS, GOAL = 16, 2.5
"""Of a large base: questions, and how many times as fast as PEFT, at least."""
REFEREED = 100
"""Questions that are also scored in float64, for the base and one adapter."""


def at_least(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-likelihoods: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def plain_loop(model: Any, names: Sequence[str], items: Sequence[EncodedExample]) -> np.ndarray:
    """Log-likelihoods (contenders, questions, choices) by a batched loop over PEFT's model."""
    device = next(model.parameters()).device
    rows = [(i, c) for i, item in enumerate(items) for c in range(len(item.choices))]
    found = np.zeros((len(names) + 1, len(items), max(len(i.choices) for i in items)))

    def score(contender: int) -> None:
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            whole = [(*items[i].prompt, *items[i].choices[c]) for i, c in part]
            longest = max(map(len, whole))
            ids = torch.zeros((len(part), longest), dtype=torch.long)
            mask = torch.zeros((len(part), longest), dtype=torch.long)
            for r, tokens in enumerate(whole):
                ids[r, : len(tokens)] = torch.tensor(tokens)
                mask[r, : len(tokens)] = 1
            with torch.no_grad():
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            logp = F.log_softmax(logits.to(at_least(logits.dtype)), dim=-1).cpu()
            for r, (i, c) in enumerate(part):
                first, choice = len(items[i].prompt), items[i].choices[c]
                found[contender, i, c] = sum(
                    float(logp[r, first + k - 1, token]) for k, token in enumerate(choice)
                )

    with model.disable_adapter():
        score(0)
    for contender, name in enumerate(names, 1):
        model.set_adapter(name)
        score(contender)
    return found


def ours(model: DomainModel, part: Part) -> None:
    """Score every contender on every item, without stored scores."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(model.bank, Display(quiet=True), Store(Path(folder)))
        scorer.scores(part, [None, *model.domains])


def our_logprobs(model: DomainModel, items: Sequence[EncodedExample]) -> np.ndarray:
    """Log-likelihoods as in ``plain_loop``, in the mixed batches that the scorer makes."""
    names = [None, *model.domains]
    pad = model.base.pad
    pairs = [(n, i) for i in range(len(items)) for n in range(len(names))]
    with model.bank.routed([names[n] for n, _ in pairs]):
        scores = choice_logprobs(model.base.model, [items[i] for _, i in pairs], pad)
    found = np.zeros((len(names), len(items), max(len(i.choices) for i in items)))
    for (n, i), row in zip(pairs, scores, strict=True):
        found[n, i, : len(row)] = row
    return found


def random_suite(test: Bench, count: int) -> Suite:
    """Questions of 24 words, each with four choices of two."""
    ids = test.ids(count, 32).tolist()
    words = [[f"w{i}" for i in row] for row in ids]
    rows = [
        {"question": " ".join(row[:24]), "answer": 0,
         "choices": [" ".join(row[at : at + 2]) for at in range(24, 32, 2)]}
        for row in words
    ]  # fmt: skip
    probe = Probe("random", MultipleChoice(prompt="{question}"), lambda: rows)
    return Suite("random", (probe,), list)


def large(experiment: Experiment, test: Bench) -> None:
    """All figures of a large base."""
    made = test.adapters(test.different)
    folders = [made[n % len(made)] for n in range(ADAPTERS)]
    model = test.ours(folders)
    experiment.say("PEFT loads the same")
    peer = test.peft(folders)
    part = encoded(random_suite(test, 8 if experiment.quick else QUESTIONS), model)
    theirs, own = plain_loop(peer, model.domains, part.encoded), our_logprobs(model, part.encoded)
    share = float((np.abs(theirs - own) / np.abs(theirs).clip(min=1)).max())
    experiment.figure("largest difference of a log-likelihood, as a share", "", share)
    runs = experiment.turns({
        "peft": lambda: plain_loop(peer, model.domains, part.encoded),
        "ours": lambda: ours(model, part),
    })  # fmt: skip
    name = f"{len(part.rows)} questions, {ADAPTERS} adapters"
    experiment.figure(name, "ms", runs["ours"], runs["peft"])
    experiment.figure(f"{name}, speed over PEFT's", "×", ratios(runs["peft"], runs["ours"]),
                      at_least=GOAL)  # fmt: skip
    experiment.save(test.settings | {"questions": len(part.rows), "adapters": ADAPTERS})


def encoded(suite: Suite, model: DomainModel) -> Part:
    """The questions of ``suite`` as the scorer takes them."""
    tokenization = Tokenization(model.tokenizer, model.base.context)
    rows = [EncodedRow(e, tokenization.encode(e)) for _, _, e in suite.questions()]
    return Part("questions", suite.probes[0].task, rows)


def main() -> None:
    if any(word.startswith("--shape") for word in sys.argv):
        experiment = Experiment("evaluation", __doc__, shapes=True)
        for name in experiment.shapes:
            with bench(experiment, name) as test:
                large(experiment, test)
    else:
        on_embedded_questions()


def on_embedded_questions() -> None:
    """The embedded questions, on the embedded base or ``--base``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="default: the embedded base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="to try the script; stores nothing")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: benchmarks/results")
    flags = parser.parse_args()
    if flags.quick:
        flags.questions, flags.rounds = 8, 1
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_domains.embedded import BASE_PATH

    with tempfile.TemporaryDirectory() as folder:
        model = DomainModel.from_pretrained(
            flags.base, device=flags.device, dtype=flags.dtype, out=folder,
            display=Display(quiet=True),
        )  # fmt: skip
        for n in range(ADAPTERS):
            adapter = new_adapter(model.base, f"domain{n}", Lora(), rank=16, alpha=32, seed=n)
            for _, b in adapter.weights.values():
                # A new B is zero, and an adapter without effect would prove nothing.
                b.normal_(std=0.02, generator=torch.Generator().manual_seed(n))
            save_random(Path(folder) / adapter.name, adapter, model.base)
            model.load_adapter(Path(folder) / adapter.name)
        plain = AutoModelForCausalLM.from_pretrained(
            flags.base or BASE_PATH, dtype=DTYPES[flags.dtype]
        )
        plain = plain.to(flags.device).eval()
        names = list(model.domains)
        peer = PeftModel.from_pretrained(plain, Path(folder) / names[0], adapter_name=names[0])
        for name in names[1:]:
            peer.load_adapter(Path(folder) / name, adapter_name=name)
        peer.eval()

        whole = encoded(embedded(), model)
        step = max(1, len(whole.rows) // flags.questions)
        rows = whole.rows[::step][: flags.questions]
        part = Part(whole.name, whole.task, rows)
        print(f"{len(rows)} questions, {ADAPTERS} adapters, load {os.getloadavg()[0]:.2f}")
        theirs, own = plain_loop(peer, names, part.encoded), our_logprobs(model, part.encoded)
        gap = float(np.abs(theirs - own).max())
        share = float((np.abs(theirs - own) / np.abs(theirs).clip(min=1)).max())
        print(f"largest difference of a log-likelihood: {gap:.2e}, as a share {share:.2e}")
        few = part.encoded[:REFEREED]
        exact = plain_loop(copy.deepcopy(peer).double(), names[:1], few)
        from_exact = {
            name: float(np.abs(scores[:2, : len(few)] - exact).max())
            for name, scores in (("peft", theirs), ("ours", own))
        }
        print(f"largest distance from float64: {from_exact}")
        contenders: dict[str, Work] = {
            "peft": lambda: plain_loop(peer, names, part.encoded),
            "ours": lambda: ours(model, part),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(flags.rounds):
            for who, work in contenders.items():
                times[who].append(timed(work, flags.device))
            print(f"round {turn + 1}: PEFT {times['peft'][-1]:.2f} s, "
                  f"ours {times['ours'][-1]:.2f} s")  # fmt: skip
        memory = []
        for fold in (1, 4):
            large = Part("questions", part.task, [*part.rows] * fold)
            ours(model, large)
            memory.append(peak_memory(model.base.device))
    named = Path(flags.base).name if flags.base else "the embedded base"
    medians = {name: statistics.median(found) for name, found in times.items()}
    result = {
        "command": "python benchmarks/speed/evaluation.py"
        + (f" --device {flags.device} --dtype {flags.dtype}" if flags.device != "cpu" else "")
        + (f" --base {named} --questions {flags.questions}" if flags.base else ""),
        "base": named, "questions": len(rows), "adapters": ADAPTERS, "rounds": flags.rounds,
        "seconds": {name: [round(t, 3) for t in found] for name, found in times.items()},
        "times_faster": round(medians["peft"] / medians["ours"], 2),
        "largest_difference": gap, "largest_share": share, "from_float64": from_exact,
        "peak_memory_bytes": {"questions": memory[0], "four times the questions": memory[1]},
        "load": round(os.getloadavg()[0], 2), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(), "device": flags.device,
        "dtype": flags.dtype,
    }  # fmt: skip
    print(f"{result['times_faster']} times faster")
    results = flags.out or (None if flags.quick else RESULTS)
    if results is not None:
        path = results / "evaluation.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[" ".join((flags.device, flags.dtype, *([named] if flags.base else [])))] = result
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
