"""What commands take before they do anything: processor time, over what their imports take.

    python benchmarks/speed/startup.py          # 4 minutes on one core

Each command is a process of its own; commands and bare imports take turns. Processor time, of user
and system, is that of the process and of those that it starts. Compiled files exist (a first run
is not counted). ``predict`` answers one text with an adapter on the embedded base, beside a script
that imports the libraries which ``predict`` has loaded by then. The recipe is launched by
Accelerate on the embedded rows, and ends before its first step, beside those imports in a launched
script.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Experiment, ratios

from lora_domains import DomainModel, load_domain
from lora_domains.console import Display

ROOT = Path(__file__).parents[2]
LIGHT = 0.15
"""Seconds of processor time: the goal for commands that read or explain."""
TEXT = "Sudden weakness of the left arm since this morning."
IMPORTS = """import accelerate, peft, scipy, torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
"""
"""What a script would import that does the same: what is loaded when ``predict`` has answered, and
at the first step of the recipe."""
FIRST_STEP = """
import sys
from lora_domains.training.loop import Run

def first(*_):
    sys.stdout.flush()
    import os
    os._exit(0)

Run.train_step = first
sys.argv = ["recipes/medical.py", "--out", sys.argv[1]]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


def processor(*words: str, cwd: Path) -> float:
    """Seconds of processor time of ``python WORDS``; raises where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    before = os.times()
    subprocess.run([sys.executable, *words], cwd=cwd, env=environment, check=True,
                   capture_output=True)  # fmt: skip
    after = os.times()
    return (after.children_user - before.children_user
            + after.children_system - before.children_system)  # fmt: skip


def main() -> None:
    experiment = Experiment("startup", __doc__, dtypes=())
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = str(folder / "adapters")
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True))
        model.fit(load_domain(str(ROOT / "recipes" / "medical.py")), max_steps=1)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        for name, script in {"imports": IMPORTS, "first": FIRST_STEP}.items():
            (folder / f"{name}.py").write_text(script, encoding="utf-8")
        cli = ("-m", "lora_domains.cli.main")
        commands = {
            "--help": (*cli, "--help"),
            "list": (*cli, "list", "--out", out),
            "show": (*cli, "show", "medical", "--out", out),
            "predict": (*cli, "predict", "medical", TEXT, "--out", out),
            "imports of predict": ("imports.py",),
            "launched recipe, to its first step": (*LAUNCH, "first.py", str(folder / "new")),
            "launched imports": (*LAUNCH, "imports.py"),
        }
        runs: dict[str, list[float]] = {name: [] for name in commands}
        for round_ in range(-1, experiment.rounds):
            experiment.say(f"round {round_ + 1} of {experiment.rounds}")
            for name, words in commands.items():
                seconds = processor(*words, cwd=folder)
                if round_ >= 0:
                    runs[name].append(seconds)
    for name in ("--help", "list", "show"):
        experiment.figure(f"{name}, processor time", "s", runs[name], at_most=LIGHT)
    predict, bare = runs["predict"], runs["imports of predict"]
    experiment.figure("predict of one text, processor time", "s", predict)
    experiment.figure("predict over its imports", "×", ratios(predict, bare), at_most=1.2)
    launched = runs["launched recipe, to its first step"]
    over = ratios(launched, runs["launched imports"])
    experiment.figure("launched recipe to its first step, processor time", "s", launched)
    experiment.figure("launched recipe over its imports", "×", over, at_most=1.1)
    experiment.save({"text": TEXT, "imports": IMPORTS})


if __name__ == "__main__":
    main()
