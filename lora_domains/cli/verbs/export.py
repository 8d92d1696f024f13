"""The verb export. torch is imported late."""

import argparse

from lora_domains.cli.flags import ADAPTERS, add_adapter_argument, add_base_flags, add_quiet_flag
from lora_domains.cli.parser import Verbs, add_verb
from lora_domains.cli.recipes import open_model


def add_export(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "export", export,
        group="more",
        summary="merge an adapter into its base and save the model",
        usage="ADAPTER --out DIR [options]",
        description="Merge an adapter into its base. Writes a plain transformers model with its "
        "tokenizer into --out, and shows how far its logits are from those of the adapter.",
        example="lora-domains export triage --out merged/triage --dtype bfloat16",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, help=f"its folder, its name in "
                         f"{ADAPTERS}/, or OWNER/NAME@REVISION on the Hub")  # fmt: skip
    add_base_flags(inputs, quantised=False)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the merged model (required)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), metavar="DTYPE",
        help="dtype of the merged weights: float32 (default), bfloat16 or float16")  # fmt: skip
    add_quiet_flag(output)


def export(flags: argparse.Namespace) -> int:
    """Merge an adapter into its base."""
    # On the CPU in float32, so that the reported error is that of the saved weights.
    model = open_model(flags, out=ADAPTERS, adapter=flags.adapter, device="cpu", dtype="float32")
    model.export(model.load_adapter(flags.adapter), flags.out, dtype=flags.dtype)
    return 0
