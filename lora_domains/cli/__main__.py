"""``python -m lora_domains.cli``: the ``lora-domains`` command."""

from lora_domains.cli.main import main

main()
