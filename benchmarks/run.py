"""What adapters gained and kept: the verb `lora-domains benchmark`, for `accelerate launch`.

accelerate launch benchmarks/run.py adapters/* --suite embedded --out reports
"""

import sys

from lora_domains.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
