"""All embedded domains at once: their rows share passes through the frozen base."""

from pathlib import Path

from lora_domains import load_domain, run_recipes

NAMES = ("medical", "legal", "finance", "support", "spam")

domains = [load_domain(Path(__file__).with_name(f"{name}.py")) for name in NAMES]

if __name__ == "__main__":
    run_recipes(domains)
