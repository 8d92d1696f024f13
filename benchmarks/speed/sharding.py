"""What a process holds of a base that is shared out to several, and what a step then costs.

    python benchmarks/speed/sharding.py --base .bases/smollm2   # 2 processes; about 3 minutes
    python benchmarks/speed/sharding.py --quick                 # the embedded base; stores nothing

It launches two processes over gloo twice, with the whole base in each and with a sharded one.
Resident memory is what loading added to it, once every weight was read. The peak while loading is
of anonymous memory, sampled every 2 ms: pages of a mapped file are shared by the processes, and are
given up where memory is scarce. Results go to benchmarks/results/sharding.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "sharding.json"
ROWS, TOKENS, STEPS = 2, 128, 5


def memory(kind: str) -> int:
    """Bytes of this process: "VmRSS", all that is resident, or "RssAnon", without mapped files."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if kind in line) * 1024


class Peak:
    """The most anonymous memory inside, sampled in a thread."""

    def __enter__(self) -> "Peak":
        self.bytes, self._over = memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, memory("RssAnon"))


def measured(base: str | None, sharded: bool) -> dict[str, Any]:
    """What one process of a launch finds."""
    from lora_domains import distributed
    from lora_domains.adapters.peft import new_adapter
    from lora_domains.domain import Lora
    from lora_domains.inference.memory import release
    from lora_domains.model import DomainModel

    distributed.state()
    # Libraries are imported, and the process groups are there.
    DomainModel.from_pretrained(sharded=sharded)
    before, anonymous = memory("VmRSS"), memory("RssAnon")
    with Peak() as peak:
        model = DomainModel.from_pretrained(base, sharded=sharded)
    release(torch.device("cpu"))
    held = memory("VmRSS") - before
    loaded, bank = model.base, model.bank
    digest = loaded.state_digest()
    parameters = bank.add(new_adapter(loaded, "a", Lora(), 16, 32, 0), trainable=True)
    ids = (torch.arange(ROWS * TOKENS) * 7 % loaded.vocabulary).reshape(ROWS, TOKENS)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        with bank.routed("a"):
            loss = loaded.model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
        loss.backward()
        distributed.summed(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        seconds.append(time.perf_counter() - start)
    return {
        "parameter_bytes": loaded.resident_bytes(), "resident_bytes": held,
        "peak_bytes": peak.bytes - anonymous, "step_seconds": statistics.median(seconds[1:]),
        "identity": loaded.identity, "digest": digest,
    }  # fmt: skip


def launched(base: str | None, sharded: bool) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            ROOT / "recipes" / "accelerate" / "sharded.yaml", "--main_process_port", "0",
            __file__, "--inside", folder, *(["--base", base] if base else []),
            *(["--sharded"] if sharded else []),
        ]  # fmt: skip
        subprocess.run([*map(str, command)], check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", help="folder of a base; default: the embedded one")
    add("--quick", action="store_true", help="the embedded base; stores nothing")
    add("--inside", metavar="DIR", help=argparse.SUPPRESS)
    add("--sharded", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.inside:
        found = measured(flags.base, flags.sharded)
        rank = os.environ["RANK"]
        (Path(flags.inside) / f"{rank}.json").write_text(json.dumps(found))
        return
    load = os.getloadavg()[0]
    whole, sharded = (launched(flags.base, on) for on in (False, True))
    assert len({one["digest"] for one in (*whole, *sharded)}) == 1
    names = ("parameter_bytes", "resident_bytes", "peak_bytes", "step_seconds")
    ratios = {
        name: max(one[name] for one in sharded) / min(one[name] for one in whole) for name in names
    }
    result = {
        "base": Path(flags.base).name if flags.base else "embedded",
        "identity": whole[0]["identity"], "processes": 2, "rows": ROWS, "tokens": TOKENS,
        "whole": [{name: one[name] for name in names} for one in whole],
        "sharded": [{name: one[name] for name in names} for one in sharded],
        "ratios": ratios, "goals": {"parameter_bytes": 0.6, "resident_bytes": 0.6},
        "torch": torch.__version__, "python": platform.python_version(),
        "cores": os.cpu_count(), "load": load,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if not flags.quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
