"""What does an adapter remember of a secret in its rows? Exposure of planted canaries.

    python benchmarks/evaluation/canaries.py      # a minute and a half on one core

Secrets of one form are planted in general text a few times or often, and others of that form kept
unseen. Exposure (Carlini et al. 2019) is how many bits easier the adapter finds a planted one than
the unseen: 1.44 by chance, 8 for the easiest of 256.
"""

import json
import tempfile
from pathlib import Path

from lora_domains import Data, Domain, DomainModel, LanguageModelling
from lora_domains.console import Display
from lora_domains.data.tokenization import Tokenization
from lora_domains.domain import with_settings
from lora_domains.embedded.world import general_text
from lora_domains.inference.likelihoods import answer_nats
from lora_domains.stats.membership import canaries, exposure
from lora_domains.tasks import Example

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "canaries.json"
REPEATS, EACH, UNSEEN, EPOCHS = (1, 4, 16), 4, 255, 4
FORM = "the code of the locker is {}."


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
        found = {}
        for name in (None, "canaries"):
            with model.using(name):
                pad = model.tokenizer.pad_token_id
                nats, _ = answer_nats(model.base.model, tokenization.encode_all(examples), pad)
            of = dict(zip(secrets, nats.tolist(), strict=True))
            found[name or "base"] = {
                f"planted {n} times": [round(exposure(of[s], [of[u] for u in unseen]), 2)
                                       for s in few]
                for n, few in planted.items()
            }  # fmt: skip
    result = {"unseen": UNSEEN, "epochs": EPOCHS, "rows": len(texts), "bits": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
