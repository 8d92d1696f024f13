"""The cost of an un-merged adapter over the bare base.

    python benchmarks/speed/overhead.py   # fp32 and bf16: about 5 minutes on 2 cores
    python benchmarks/speed/overhead.py --device cuda --dtype bfloat16

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
    if DTYPES[dtype] is not torch.float32:
        found[NARROW] = test.peft(folders, dtype, autocast_adapter_dtype=False).to(DTYPES[dtype])
    return found


def workloads(test: Bench) -> dict[str, tuple[int, Any]]:
    """By name: the steps that the time is divided by, and the work for a forward pass."""
    one, many, long = test.ids(1, 16), test.ids(16, 16), test.ids(1, PREFILL)

    def prefill(call: Any) -> Work:
        return lambda: call(input_ids=long, use_cache=False)

    return {
        "decode, 1 row": (STEPS, lambda call: decode(call, one, STEPS)),
        "decode, 16 rows": (STEPS, lambda call: decode(call, many, STEPS)),
        f"prefill, {PREFILL} tokens": (1, prefill),
    }


def main() -> None:
    experiment = Experiment("overhead", __doc__, dtypes=("float32", "bfloat16"))
    with bench(experiment) as test:
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


if __name__ == "__main__":
    main()
