"""How much an adapter memorises of secrets in its rows: the exposure of planted canaries.

    python benchmarks/evaluation/canaries.py      # a minute and a half on one core

Secrets of one form are planted in general text, each up to 16 times; others of that form stay
unseen. Exposure (Carlini et al. 2019) is the number of bits by which a planted secret is easier for
the adapter than unseen ones: 1.44 by chance, 8 for the easiest of 256.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_domains import Data, Domain, DomainModel, LanguageModelling
from lora_domains.console import Display
from lora_domains.domain import with_settings
from lora_domains.embedded.world import general_text
from lora_domains.inference.likelihoods import answer_nats
from lora_domains.tasks import Example
from lora_domains.tokenization.tokenization import Tokenization

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "canaries.json"
REPEATS, EACH, UNSEEN, EPOCHS = (1, 4, 16), 4, 255, 4
FORM = "the code of the locker is {}."


def canaries(count: int, seed: int = 0, digits: int = 6) -> list[str]:
    """``count`` different random secrets, such as "481 023".

    Raises ValueError for more than there are of ``digits`` digits.
    """
    if not 0 < count <= 10**digits:
        raise ValueError(f"canaries expects 1 to {10**digits:,} of them; found {count:,}.")
    numbers = np.random.default_rng(seed).choice(10**digits, size=count, replace=False)
    half = digits // 2
    return [
        f"{number:0{digits}d}"[:half] + " " + f"{number:0{digits}d}"[half:] for number in numbers
    ]


def exposure(planted: float, unseen: Sequence[float]) -> float:
    """Bits by which a planted secret is easier for the model than ``unseen`` ones, from their nats.

    log2 of the number of secrets minus log2 of the planted one's rank by nats; ties count against
    it. 0 for the hardest secret, log2(len(unseen) + 1) for the easiest, 1.44 on average by chance.
    Source: Carlini et al. (2019), USENIX Security, definition 5, with the space of secrets sampled.
    """
    rank = 1 + sum(nats <= planted for nats in unseen)
    return math.log2(len(unseen) + 1) - math.log2(rank)


def main() -> None:
    secrets = canaries(EACH * len(REPEATS) + UNSEEN, seed=1)
    unseen = secrets[-UNSEEN:]
    planted = {n: secrets[i * EACH : (i + 1) * EACH] for i, n in enumerate(REPEATS)}
    rows = [FORM.format(s) for n, few in planted.items() for s in few * n]
    texts = [{"text": text} for text in [*rows, *general_text("train", 300)]]
    held_out = [{"text": text} for text in general_text("test", 80)]
    domain = Domain("canaries", LanguageModelling(), Data(texts, held_out[:40], held_out[40:]))
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True))
        model.fit(with_settings(domain, epochs=EPOCHS, patience=EPOCHS))
        tokenization = Tokenization(model.tokenizer, model.base.context)
        examples = [Example(s, "", FORM.format(s)) for s in secrets]
        bits = {}
        for name in (None, "canaries"):
            with model.using(name):
                pad = model.base.pad
                nats, _ = answer_nats(model.base.model, tokenization.encode_all(examples), pad)
            of = dict(zip(secrets, nats.tolist(), strict=True))
            bits[name or "base"] = {
                f"planted {n} times": [round(exposure(of[s], [of[u] for u in unseen]), 2)
                                       for s in few]
                for n, few in planted.items()
            }  # fmt: skip
    result = {"unseen": UNSEEN, "epochs": EPOCHS, "rows": len(texts), "bits": bits}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
