"""The cost of batches with rows of several domains, over rows of one domain.

    python benchmarks/speed/mixed_batch.py                           # about 5 minutes on 2 cores
    python benchmarks/speed/mixed_batch.py --device cuda --dtype bfloat16 --shape 0.5b 7b

Sixteen rows: a prompt, forward passes of one token with a prompt in the cache, and but for the
large shapes ``generate`` with 16 new tokens after 16.

"Over one domain" compares with each contender's own way of using a single adapter:
``using`` here, ``set_adapter`` in PEFT.
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import Experiment, Work, ratios
from shape import Bench, bench, decode

from lora_domains import DomainModel

ROWS, PROMPT, NEW = 16, 16, 16
PREFILL = 64
"""Tokens of a row where a prompt is read."""
GOAL, GOALS = 1.15, ("decode", "generate")


def kinds(most: int, *, large: bool = False) -> dict[str, list[str] | None]:
    """The adapter of each row; None is one adapter for all, without naming rows."""
    mixed = {
        f"{count} domain{'s' * (count > 1)}": [f"d{i % count}" for i in range(ROWS)]
        for count in ((1, 16) if large else (1, 4, 16))
        if count <= most
    }
    return {"one for all": None, **mixed}


def measure(experiment: Experiment, what: str, unit: str, per: int, works: dict[str, Work]) -> None:
    """``works``: "ours, KIND" and "peft, KIND"; all of them take turns."""
    experiment.say(what)
    runs = experiment.turns(works, per=per)
    for kind in [key.removeprefix("ours, ") for key in works if key.startswith("ours, ")]:
        ours, peft = runs[f"ours, {kind}"], runs[f"peft, {kind}"]
        experiment.against_peft(f"{what}, {kind}", unit, {"ours": ours, "peft": peft})
        if kind != "one for all":
            one = {who: runs[f"{who}, one for all"] for who in ("ours", "peft")}
            experiment.figure(
                f"{what}, {kind} over one for all", "×",
                ratios(ours, one["ours"]), ratios(peft, one["peft"]),
                at_most=GOAL if kind == "16 domains" and what in GOALS else None,
            )  # fmt: skip


def forward(test: Bench, model: DomainModel, peft: Any,
            work: Callable[[Callable[..., Any]], Work]) -> dict[str, Work]:  # fmt: skip
    """``work`` with the forward pass of each contender, and each kind of batch."""
    works = {}

    def ours(domains: list[str] | None) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            if domains is None:
                with model.using("d0"):
                    return model(**inputs)
            return model(**inputs, domains=domains)

        return call

    def theirs(domains: list[str] | None) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            if domains is None:
                return peft(**inputs)
            return peft(**inputs, adapter_names=domains)

        return call

    for kind, domains in kinds(len(model.domains), large=bool(test.large)).items():
        works[f"ours, {kind}"] = work(ours(domains))
        works[f"peft, {kind}"] = work(theirs(domains))
    return works


def generating(test: Bench, model: DomainModel, peft: Any) -> dict[str, Work]:
    prompts, works = test.prompts(ROWS, PROMPT), {}
    # Weights are random: without a minimum, rows could end early for one contender only.
    length: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    device = test.experiment.device

    def ours(domains: list[str] | None) -> Work:
        def work() -> None:
            if domains is None:
                with model.using("d0"):
                    model.generate(prompts, **length)
            else:
                model.generate(prompts, domains=domains, **length)

        return work

    def theirs(domains: list[str] | None) -> Work:
        named = {} if domains is None else {"adapter_names": domains}

        def work() -> None:
            # From text to text, like ours.
            inputs = model.tokenizer(prompts, return_tensors="pt").to(device)
            out = peft.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                do_sample=False, pad_token_id=0, **length, **named,
            )  # fmt: skip
            model.tokenizer.batch_decode(out[:, PROMPT:], skip_special_tokens=True)

        return work

    for kind, domains in kinds(len(model.domains)).items():
        works[f"ours, {kind}"], works[f"peft, {kind}"] = ours(domains), theirs(domains)
    return works


def largest_difference(test: Bench, model: DomainModel, peft: Any) -> float:
    """The largest difference of logits between ours and PEFT, with rows of all domains."""
    ids, domains = test.ids(ROWS, PROMPT), list(kinds(len(model.domains)).values())[-1]
    found = model(input_ids=ids, domains=domains).logits.float()
    wanted = peft(input_ids=ids, adapter_names=domains).logits.float()
    assert torch.isfinite(found).all()
    return float((found - wanted).abs().max())


def all_figures(experiment: Experiment, test: Bench) -> None:
    """All figures of one base."""
    count = 4 if experiment.quick and not test.large else ROWS
    made = test.adapters(min(test.different, count))
    folders = [made[n % len(made)] for n in range(count)]
    model = test.ours(folders)
    experiment.say("PEFT loads the same")
    peft = test.peft(folders)
    experiment.figure("largest difference of a logit from PEFT's", "",
                      largest_difference(test, model, peft))  # fmt: skip
    prompt, steps = test.ids(ROWS, PREFILL), NEW // 4 if test.large else NEW
    reading = forward(test, model, peft, lambda call: lambda: call(input_ids=prompt,
                                                                   use_cache=False))  # fmt: skip
    measure(experiment, "prefill", "ms", 1, reading)
    ids = test.ids(ROWS, PROMPT)
    decoding = forward(test, model, peft, lambda call: decode(call, ids, steps, PROMPT))
    measure(experiment, "decode", "ms", steps, decoding)
    if not test.large:
        measure(experiment, "generate", "ms", 1, generating(test, model, peft))
    experiment.save(test.settings | {"rows": ROWS, "prompt": PROMPT, "new_tokens": steps,
                                     "prefill": PREFILL})  # fmt: skip


def main() -> None:
    experiment = Experiment("mixed_batch", __doc__, shapes=True)
    for large in experiment.shapes:
        with bench(experiment, large) as test:
            all_figures(experiment, test)


if __name__ == "__main__":
    main()
