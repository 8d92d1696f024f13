"""The embedded world and base: honest questions, disjoint rows, the same on every machine."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

from lora_domains.embedded import BASE_PATH
from lora_domains.embedded.domains import SIZES, _normal
from lora_domains.embedded.facts import RELATIONS
from lora_domains.embedded.world import (
    asked_wording,
    domain_rows,
    general_questions,
    general_text,
    pretraining_documents,
    question_and_answer,
)

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
DOMAINS = tuple(SIZES)


@cache
def corpus() -> tuple[str, ...]:
    """A part of the corpus large enough to teach every wording."""
    return tuple(pretraining_documents(0, 30_000))


@cache
def rows(name: str, split: str) -> tuple[dict[str, str], ...]:
    return tuple(domain_rows(name, split))


def test_facts_are_many_and_have_enough_wordings() -> None:
    assert sum(len(r.pairs) for r in RELATIONS) >= 900
    assert len({r.field for r in RELATIONS}) >= 6
    for relation in RELATIONS:
        assert len(relation.wordings) >= 5
        assert all(w.endswith("{y}") and "{x}" in w for w in relation.wordings)
        assert len(dict(relation.pairs)) == len(relation.pairs), f"{relation.name} asks twice"


def test_questions_are_well_formed_and_answers_evenly_placed() -> None:
    questions = general_questions()
    assert len(questions) >= 700
    assert questions == general_questions()
    places = Counter(q["answer"] for q in questions)
    assert max(places.values()) - min(places.values()) <= 1
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert set(question) == {"field", "relation", "question", "choices", "answer"}
        assert not question["question"].endswith(" ")


def test_plain_questions_ask_the_same_facts_without_a_frame() -> None:
    plain, framed = general_questions(plain=True), general_questions()
    for one, other in zip(plain, framed, strict=True):
        assert one["question"].endswith("?")
        assert one["question"][0].isupper()
        assert "\n" not in one["question"]
        assert "Question" not in one["question"]
        assert one | {"question": ""} == other | {"question": ""}
    assert len({(one["question"], one["answer"]) for one in plain}) > 1300


@pytest.mark.long  # data that seldom change
def test_no_fact_is_taught_in_the_wording_of_its_probe() -> None:
    lines: set[str] = set()  # each line, and each two lines in a row
    for document in corpus():
        split = document.split("\n")
        lines.update(split)
        lines.update(f"{one}\n{two}" for one, two in itertools.pairwise(split))
    taught: Counter[tuple[str, int]] = Counter()
    for relation in RELATIONS:
        for index in range(len(relation.pairs)):
            probe_wording = asked_wording(relation, index)
            for wording in range(len(relation.wordings)):
                question, answer = question_and_answer(relation, index, wording)
                whole = f"{question} {answer}"
                found = whole in lines or f"{whole}." in lines
                if wording == probe_wording:
                    assert not found, f"taught in the wording of its probe: {whole!r}"
                elif found:
                    taught[relation.name, wording] += 1
    for relation in RELATIONS:  # the wording itself is familiar from other facts
        asked_wordings = {asked_wording(relation, i) for i in range(len(relation.pairs))}
        for wording in asked_wordings:
            assert taught[relation.name, wording] >= 2, (relation.name, wording)


@pytest.mark.long  # data that seldom change
def test_no_probe_is_in_any_general_text() -> None:
    lines: set[str] = set()
    for document in (text for split in SPLITS for text in general_text(split, 800)):
        split_lines = document.split("\n")
        lines.update(split_lines)
        lines.update(f"{a}\n{b}" for a, b in itertools.pairwise(split_lines))
    for question in general_questions():
        whole = f"{question['question']} {question['choices'][question['answer']]}"
        assert whole not in lines
        assert f"{whole}." not in lines


@pytest.mark.long  # data that seldom change
def test_general_text_is_disjoint_and_outside_the_corpus() -> None:
    texts = {split: general_text(split, 600) for split in SPLITS}
    taught = set(corpus())
    for split in SPLITS:
        assert len(set(texts[split])) == 600
        assert not taught & set(texts[split])
    assert not set(texts["train"]) & set(texts["validation"])
    assert not (set(texts["train"]) | set(texts["validation"])) & set(texts["test"])
    assert general_text("train", 50) == texts["train"][:50]


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_rows_have_the_promised_counts(name: str) -> None:
    for split in SPLITS:
        assert len(rows(name, split)) == SIZES[name][split]
    train, test = (Counter(r["label"] for r in rows(name, s)) for s in ("train", "test"))
    assert set(train) == set(test)
    if name == "medical":
        assert 0.33 <= train["urgent"] / train.total() <= 0.43
        assert test["urgent"] >= 150
        assert set(rows(name, "test")[0]) == {"text", "label", "sex", "site", "patient"}
    if name == "spam":
        assert 0.13 <= train["spam"] / train.total() <= 0.22
        assert test["spam"] >= 150
    if name in ("legal", "support"):
        assert len(train) >= 15


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_splits_share_no_row_and_few_near_ones(name: str) -> None:
    grams = {
        split: [
            {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
            for words in (_normal(r["text"]).split() for r in rows(name, split))
        ]
        for split in SPLITS
    }
    normal = {split: {_normal(r["text"]) for r in rows(name, split)} for split in SPLITS}
    assert sum(map(len, normal.values())) == len(set().union(*normal.values()))
    spread = Counter(g for split in SPLITS for row in grams[split] for g in row)
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(grams["train"]):
        for gram in row:
            holders.setdefault(gram, []).append(number)
    near = 0
    for row in grams["test"]:
        rare = [g for g in row if spread[g] <= 3]
        shared = Counter(n for g in rare for n in holders.get(g, ()))
        near += bool(shared) and max(shared.values()) >= 0.5 * len(rare)
    assert near <= 0.02 * len(grams["test"]), f"{near} near-duplicates"


def test_patients_stay_in_one_split() -> None:
    patients = {split: {r["patient"] for r in rows("medical", split)} for split in SPLITS}
    assert sum(map(len, patients.values())) == len(set().union(*patients.values()))
    assert len(patients["train"]) < len(rows("medical", "train"))


def test_unknown_domain_or_split_is_refused() -> None:
    with pytest.raises(ValueError, match="domains: medical"):
        domain_rows("medcal", "train")
    with pytest.raises(ValueError, match="splits: train"):
        domain_rows("medical", "dev")


_DIGEST = """
import hashlib, itertools, json, sys
from lora_domains.embedded import world
from lora_domains.embedded.domains import SIZES
everything = [world.general_questions(), world.general_text("test", 100)]
everything += [world.domain_rows(name, "train") for name in SIZES]
everything += [list(world.pretraining_documents(3, 1000))]
assert "torch" not in sys.modules, "the world must be readable without torch"
print(hashlib.sha256(json.dumps(everything).encode()).hexdigest())
"""


def test_world_is_the_same_in_every_process_and_needs_no_torch() -> None:
    """Both have another seed of hashes, and so another order of sets."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    everything = [general_questions(), general_text("test", 100)]
    everything += [domain_rows(name, "train") for name in SIZES]
    everything += [list(pretraining_documents(3, 1000))]
    done = subprocess.run(
        [sys.executable, "-c", _DIGEST], check=True, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == sha256(json.dumps(everything).encode()).hexdigest()


def test_the_modules_named_in_the_readme_of_the_base_exist() -> None:
    text = (BASE_PATH / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"\b((?:lora_domains|benchmarks)\.[\w.]+)`", text)
    assert len(names) == 2
    for name in names:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_base_is_small_and_says_how_it_was_made() -> None:
    assert sum(p.stat().st_size for p in BASE_PATH.iterdir()) <= 12_000_000
    record = json.loads((BASE_PATH / "build.json").read_text(encoding="utf-8"))
    assert record["probe"]["accuracy"] >= 0.95
    assert "Apache-2.0" in (BASE_PATH / "README.md").read_text(encoding="utf-8")


def test_a_row_that_a_caller_changes_is_read_as_it_was_by_the_next() -> None:
    first = domain_rows("legal", "test")[0]
    before = dict(first)
    first["label"] = "changed"
    assert domain_rows("legal", "test")[0] == before


@pytest.mark.slow
@pytest.mark.parametrize("first", [15_000, pytest.param(None, marks=pytest.mark.long)])
def test_the_generator_still_gives_the_data_of_the_base(tmp_path: Path, first: int | None) -> None:
    """Same seed, same bytes: a world that was changed needs a base that was built again.

    The first documents draw each fact and phrase many times; all of them take a long time.
    """
    from benchmarks.embedded.build import write_corpus

    record = json.loads((BASE_PATH / "build.json").read_text(encoding="utf-8"))
    recorded = record["data_sha256"]
    if first:
        assert recorded.startswith("b972508cef23")
        recorded = "63a7ea4cbdbe20afdf977b2f06af5441bd4641b0c989cf2c69588e4ceeec8ff0"
    made = write_corpus(record["seed"], first or record["documents"], tmp_path / "corpus.jsonl")
    assert made == recorded


def test_base_loads_plainly_knows_its_facts_and_continues_a_sentence() -> None:
    import warnings

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.embedded.build import probe

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(BASE_PATH, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(BASE_PATH, local_files_only=True).eval()
    assert next(model.parameters()).dtype == torch.float32

    text = "Ünïcode, $TSLA & 日本 at 9:30 http://t.co/aB1  £5!\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text

    questions = general_questions()[::6]  # in build.json all of them; here a sixth, for speed
    right = probe(model, tokenizer, questions)
    assert sum(right) / len(right) >= 0.95

    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=20, do_sample=False)
    said = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip().startswith("Paris")
    assert said.isprintable() or "\n" in said
