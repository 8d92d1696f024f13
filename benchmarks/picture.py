"""README's picture of the terminal: the medical recipe run in a recorded console.

python benchmarks/picture.py    # about two minutes; writes .github/medical.svg
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from lora_domains.cli import add_run_flags, configured, fit_and_evaluate
from lora_domains.display import Display
from lora_domains.domain import load_domain

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    add_run_flags(parser)
    with tempfile.TemporaryDirectory() as folder, Path("/dev/null").open("w") as nowhere:
        out = Path(folder) / "adapters"
        console = Console(
            record=True, force_terminal=True, width=118, highlight=False, file=nowhere
        )
        flags = parser.parse_args(["--out", str(out)])
        domain = configured(load_domain(ROOT / "recipes" / "medical.py"), flags)
        fit_and_evaluate(domain, flags, Display(console=console))
        picture = console.export_svg(title="accelerate launch recipes/medical.py")
        (ROOT / ".github" / "medical.svg").write_text(picture.replace(f"{folder}/", ""))


if __name__ == "__main__":
    main()
