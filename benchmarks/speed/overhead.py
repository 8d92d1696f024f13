"""The cost of an un-merged adapter over the bare base.

    python benchmarks/speed/overhead.py   # fp32 and bf16: about 5 minutes on 2 cores
    python benchmarks/speed/overhead.py --device cuda --dtype bfloat16 --shape 0.5b 7b

The contenders are the bare base in plain transformers, PEFT and ours. PEFT is measured with
adapters in float32, its default, and in the base's dtype.
"""

from typing import Any

import torch
from measure import DTYPES, Experiment, Work, ratios
from shape import Bench, bench, decode

STEPS, PREFILL = 16, 256
NARROW = "PEFT's adapter in the base's dtype"


def contenders(test: Bench, folders: list[Any], dtype: str) -> dict[str, Any]:
    """Forward passes by contender: base, ours, PEFT."""
    model = test.ours(folders, dtype)

    def ours(**inputs: Any) -> Any:
        with model.using("d0"):
            return model(**inputs)

    found = {"base": test.bare(dtype), "ours": ours, "peft": test.peft(folders, dtype)}
    if DTYPES[dtype] is not torch.float32 and test.large != "7b":
        found[NARROW] = test.peft(folders, dtype, autocast_adapter_dtype=False).to(DTYPES[dtype])
    return found


def workloads(test: Bench) -> dict[str, tuple[int, Any]]:
    """By name: the steps that the time is divided by, and the work for a forward pass."""
    one, many, long = test.ids(1, 16), test.ids(16, 16), test.ids(1, PREFILL)
    steps = STEPS // 2 if test.large else STEPS

    def prefill(call: Any) -> Work:
        return lambda: call(input_ids=long, use_cache=False)

    return {
        "decode, 1 row": (steps, lambda call: decode(call, one, steps)),
        "decode, 16 rows": (steps, lambda call: decode(call, many, steps)),
        f"prefill, {PREFILL} tokens": (1, prefill),
    }


def measure(experiment: Experiment, test: Bench) -> None:
    """All figures of one base."""
    folders = test.adapters(1)
    for dtype in experiment.dtypes:
        experiment.say(f"loading base, ours and PEFT in {dtype}")
        calls = contenders(test, folders, dtype)
        for name, (per, work) in workloads(test).items():
            experiment.say(f"{name}, {dtype}")
            runs = experiment.turns({who: work(call) for who, call in calls.items()}, per=per)
            experiment.figure(f"{name}, {dtype}, bare base", "ms", runs["base"])
            ours = ratios(runs["ours"], runs["base"])
            over = {"ours": ours, "peft": ratios(runs["peft"], runs["base"])}
            experiment.against_peft(f"{name}, {dtype}, over the base", "×", over)
            if NARROW in runs:
                # No goal: ours keeps adapters in float32, like PEFT by default.
                experiment.figure(f"{name}, {dtype}, over the base; {NARROW}", "×", ours,
                                  ratios(runs[NARROW], runs["base"]))  # fmt: skip
    experiment.save(test.settings | {"steps": STEPS, "prefill": PREFILL})


def main() -> None:
    experiment = Experiment("overhead", __doc__, dtypes=("float32", "bfloat16"), shapes=True)
    for large in experiment.shapes:
        with bench(experiment, large) as test:
            measure(experiment, test)


if __name__ == "__main__":
    main()
