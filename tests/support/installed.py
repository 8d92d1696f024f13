"""The main job with an installed package, outside of the checkout: rows in, verdict, predictions.

    python tests/support/installed.py build/installed/bin

Of the environment whose commands lie in that folder. Exit code 0 where all of it works.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROWS = {"train": 400, "test": 200}
MAKE_ROWS = (
    "import json; from lora_domains.embedded.world import domain_rows; "
    f"print(json.dumps({{split: domain_rows('medical', split)[:count] "
    f"for split, count in {ROWS}.items()}}))"
)


def main(commands: Path) -> None:
    """Fit, list and predict; raises CalledProcessError or AssertionError where one is wrong."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:

        def run(command: str, *arguments: str, expected: tuple[int, ...] = (0,)) -> str:
            done = subprocess.run(
                [str(commands.absolute() / command), *arguments], cwd=folder, env=environment,
                stdout=subprocess.PIPE, encoding="utf-8", check=False,
            )  # fmt: skip
            assert done.returncode in expected, (command, arguments, done.returncode)
            return done.stdout

        place = run("python", "-c", "import lora_domains; print(lora_domains.__file__)")
        assert "site-packages" in place, place
        for split, rows in json.loads(run("python", "-c", MAKE_ROWS)).items():
            with (Path(folder) / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        run("lora-domains", "fit", "--name", "triage", "--train", "train.csv", "--test", "test.csv",
            "--positive", "urgent", "--epochs", "1", expected=(0, 1, 3))  # fmt: skip
        assert "triage" in run("lora-domains", "list")
        run("lora-domains", "predict", "triage", "--input", "test.csv", "--output", "answers.csv")
        with (Path(folder) / "answers.csv").open(encoding="utf-8") as file:
            assert len([*csv.DictReader(file)]) == ROWS["test"]
    sys.stdout.write(f"fit, list and predict work from {place.strip()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
