"""A generated answer beside its reference: the scores that are stored of each pair.

Exact match and token F1 are SQuAD's, ROUGE-L is rouge-score's, BLEU and chrF are sacrebleu's. They
are numbers from which every figure is computed later, so that no text is kept. BLEU is a figure of
a whole corpus: of a pair, its n-gram counts are kept. A ``Judge`` is a program that scores answers.
"""

import json
import math
import os
import random
import re
import shlex
import signal
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_domains.errors import DomainError, JudgeError

ORDER = 4
"""The longest n-grams of BLEU."""
MATCHES = tuple(f"match_{n}" for n in range(1, ORDER + 1))
"""n-grams of an answer that its reference has too, by their length."""
BLEU_COUNTS = ("words", "reference_words", *MATCHES)
"""What BLEU is computed from: sacrebleu's tokens of the answer and of the reference, and their
common n-grams. An answer of w tokens has w - n + 1 n-grams."""
ALWAYS = frozenset({"f1", "exact", "rouge_l", "chrf", *BLEU_COUNTS})
"""The scores of every pair; ``number`` is there where the reference has one."""


def answer_scores(text: str, reference: str) -> dict[str, float]:
    """The scores of a generated ``text``, each from 0 to 1, and the counts of BLEU.

    ``f1`` and ``exact`` compare SQuAD's tokens, ``number`` the last number in each.
    """
    scores = {
        "f1": token_f1(text, reference),
        "exact": float(squad_tokens(text) == squad_tokens(reference)),
        "rouge_l": float(_rouge().score(reference, text)["rougeL"].fmeasure),
        "chrf": _chrf().sentence_score(text, [reference]).score / 100,
    }
    return scores | number_score(text, reference) | bleu_counts(text, reference)


# ── SQuAD ───────────────────────────────────────────────────────────────────────────────────────


def squad_tokens(text: str) -> list[str]:
    """Lower-case words without ASCII punctuation and English articles.

    ``normalize_answer`` of SQuAD's script (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def token_f1(text: str, reference: str) -> float:
    """F1 of the tokens of both, as ``compute_f1`` of SQuAD 2.0's script."""
    tokens, expected = squad_tokens(text), squad_tokens(reference)
    if not tokens or not expected:
        return float(tokens == expected)
    common = sum((Counter(tokens) & Counter(expected)).values())
    return 2 * common / (len(tokens) + len(expected))


# ── Reasoning ───────────────────────────────────────────────────────────────────────────────────

BEGIN = "<think>"
REASONING = re.compile(r"\A\s*(?:<think>)?(?:(?!<think>).)*?</think>\s*", re.DOTALL)
"""What Qwen3, DeepSeek-R1 and others write before an answer; it may begin in the prompt."""


def without_reasoning(text: str) -> str:
    """The answer in ``text``, which is what is scored. Reasoning without an end stays."""
    return REASONING.sub("", text)


def reasons(text: str) -> bool:
    """Whether ``text`` begins with reasoning that is not empty."""
    found = REASONING.match(text) if "</think>" in text else None
    return found is not None and bool(found[0].replace(BEGIN, "").replace("</think>", "").strip())


def unfinished(text: str) -> bool:
    """Whether ``text`` ends within its reasoning."""
    return text.lstrip().startswith(BEGIN) and "</think>" not in text


# ── Numbers ─────────────────────────────────────────────────────────────────────────────────────


MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011\u2013", "-"))
"""Minus signs, and the hyphens and the dash that are written for them."""
NUMBER = re.compile(
    r"(?:(?<![\w.)\]%-])-)?"  # in 3-4 it is no sign
    r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][+-]?\d+\b)?"
)
"""A number in a text, with commas between thousands (in India also 12,34,567)."""


NOTATION = re.compile(
    r"(?P<sign>(?<![\w.)\]%-])-[$€£¥]?)?"
    r"(?P<digits>(?<!\d)\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?:[.,]\d+)?(?!\d)"
    r"|\d+(?:[.,'’]\d+)*|(?<![\w.])\.\d+)"
    r"(?P<power>[eE][+-]?\d+\b)?"
)
"""A number as it is written in any country."""
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:(?:,\d{2,3})*,\d{3}|(?:\.\d{3}){2,})")
"""One whose commas stand between thousands, or whose points do: one point alone is decimal."""


def last_number(text: str) -> float | None:
    """The last number in ``text``, without thousands separators; None if there is none."""
    numbers = NUMBER.findall(text.translate(MINUS))
    return float(numbers[-1].replace(",", "")) if numbers else None


def number_score(text: str, reference: str) -> dict[str, float]:
    """Whether the last number of both is the same, in any notation; empty where ``reference`` has
    none."""
    if last_number(reference) is None:
        return {}
    return {"number": float(_last_value(text) == _last_value(reference))}


def _last_value(text: str) -> float | None:
    """The last number in ``text``; with a comma or a point, and spaces or apostrophes, as they
    stand between thousands or before decimals in any country."""
    *_, last = [None, *NOTATION.finditer(text.translate(MINUS))]
    if last is None:
        return last_number(text)
    digits, power = re.sub(r"[ '’\u00a0\u202f]", "", last["digits"]), last["power"] or ""
    point, comma = digits.rfind("."), digits.rfind(",")
    if point >= 0 and comma >= 0:
        digits = digits.replace("," if comma < point else ".", "")
    elif THOUSANDS.fullmatch(digits):
        digits = re.sub("[.,]", "", digits)
    try:
        value = float(digits.replace(",", ".") + power)
    except ValueError:  # 1.2.3
        return last_number(text)
    return -value if last["sign"] else value


# ── ROUGE, BLEU and chrF ────────────────────────────────────────────────────────────────────────


def bleu_counts(text: str, reference: str) -> dict[str, float]:
    """``BLEU_COUNTS``, as sacrebleu's extractor finds them."""
    found = _bleu().sentence_score(text, [reference])
    return dict(
        zip(BLEU_COUNTS, map(int, (found.sys_len, found.ref_len, *found.counts)), strict=True)
    )


class _Words:
    """Runs of letters, their marks and digits of any script: of ASCII text, rouge-score's own
    tokens."""

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return re.findall(r"[^\W_]+", text.lower())
        text = unicodedata.normalize("NFC", text.lower())  # é, and e with an accent behind it
        kept = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " "
                for char in text)  # fmt: skip
        return "".join(kept).split()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # The order matters for the score of one sentence only, about which sacrebleu would warn.
    return BLEU(effective_order=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


# ── A program that judges ───────────────────────────────────────────────────────────────────────

Asked = tuple[str, str, str]
"""Prompt, reference and answer."""
TRIAL = ("What is 1 + 1?", "2", "2")
"""What a judge is tried on, before any answer is generated."""


@dataclass(frozen=True)
class Judge:
    """A program of one's own that judges answers, as LLM judges do.

    It reads a JSON object a line from its standard input, with ``id``, ``prompt``, ``reference``
    and ``answer``, and writes a number for each to its standard output, a line each, in their
    order. ``low`` and ``high`` are its worst and its best score, ``timeout`` the seconds that it
    may take for all answers. It is run without a shell.
    """

    command: str
    low: float = 0.0
    high: float = 1.0
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        try:
            words = self.words
        except ValueError:  # an open quote
            words = []
        for name, holds, expected in (
            ("command", bool(words), "a command: a program and its arguments"),
            ("range", -math.inf < self.low < self.high < math.inf, "two numbers, the worst first"),
            ("timeout", 0 < self.timeout < math.inf, "seconds, above 0"),
        ):
            if not holds:
                raise DomainError(
                    where=f"judge, {name}",
                    expected=expected,
                    found=f"{self.low:g},{self.high:g}" if name == "range"
                    else repr(getattr(self, name)),
                    hint='For example --judge "python judge.py" --judge-range 1,10',
                )  # fmt: skip

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return shlex.split(self.command)

    @property
    def shown(self) -> str:
        """The command without paths, and without values of options, which may be secrets."""
        program, *arguments = self.words
        names = [Path(program).name]
        for word in arguments:
            option, equals, _ = word.partition("=")
            if is_file(word):
                names.append(Path(word).name)
            else:
                names.append(option + equals + "…" * bool(equals) if word[:1] == "-" else "…")
        return " ".join(names)

    def record(self) -> dict[str, Any]:
        """What a card says of the judge: the command as ``shown``, and a digest of all of it and of
        the contents of its files."""
        digest = sha256()
        for word in self.words:
            digest.update(word.encode() + b"\0")
            if is_file(word):
                with Path(word).open("rb") as file:
                    while part := file.read(2**20):
                        digest.update(part)
        return {"command": self.shown, "sha256": digest.hexdigest(), "low": self.low,
                "high": self.high}  # fmt: skip

    def check(self) -> None:
        """Try the program on ``TRIAL``, once; raises JudgeError where it cannot be run or answers
        otherwise than it should."""
        _tried(self)

    def scores(self, answers: Sequence[Asked]) -> list[float]:
        """The score of each answer, from 0 (``low``) to 1 (``high``). Raises JudgeError.

        The program cannot tell who answered: answers come in a random order, those of all
        contenders mixed, and equal ones once.
        """
        distinct = list(dict.fromkeys(answers))
        random.Random(len(distinct)).shuffle(distinct)
        names = ("prompt", "reference", "answer")
        lines = [
            json.dumps({"id": number, **dict(zip(names, one, strict=True))}, ensure_ascii=False)
            for number, one in enumerate(distinct)
        ]
        scores = self._parsed(self._output("".join(line + "\n" for line in lines)), len(distinct))
        known = dict(zip(distinct, scores, strict=True))
        return [known[one] for one in answers]

    def _output(self, text: str) -> str:
        """What the program writes when it reads ``text``; what it says to people is shown."""
        try:
            process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
                errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise self._error("a program that can be run", found, "Check its name.") from error
        with process:
            try:
                written, _ = process.communicate(text, self.timeout)
            except subprocess.TimeoutExpired:
                found, hint = "no end by then", "Give it more time: --judge-timeout SECONDS."
                raise self._error(f"all scores within {self.timeout:g} s", found, hint) from None
            finally:
                if process.poll() is None:  # with what it started
                    _end(process)
        if process.returncode:
            hint = "Run it by hand on a line of JSON; what it says itself is above."
            raise self._error("exit code 0", f"exit code {process.returncode}", hint)
        return written

    def _parsed(self, written: str, count: int) -> list[float]:
        lines = [line for line in written.splitlines() if line.strip()]
        hint = "It writes its scores, and nothing else, to standard output."
        if len(lines) != count:
            found = f"{len(lines)} line{'s' * (len(lines) != 1)}"
            raise self._error(f"{count} score{'s' * (count != 1)}, a line each", found, hint)
        scores = []
        for number, line in enumerate(lines, 1):
            score = _number(line)
            if score is None or not self.low <= score <= self.high:
                # What is no number may be text of a row.
                found = f"line {number}: {'no number' if score is None else f'{score:g}'}"
                expected = f"numbers from {self.low:g} to {self.high:g}"
                raise self._error(expected, found, f"{hint} --judge-range LOW,HIGH says which.")
            scores.append((score - self.low) / (self.high - self.low))
        return scores

    def _error(self, expected: str, found: str, hint: str) -> JudgeError:
        where = f"judge {self.shown}"
        return JudgeError(where=where, expected=expected, found=found, hint=hint)


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill ``process`` with what it started; on Windows, which has no groups, it alone."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def is_file(text: str) -> bool:
    """Whether ``text`` is the path of a file, which one that is too long for a path is not."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # ValueError: a NUL character
        return False


@cache
def _tried(judge: Judge) -> None:
    judge.scores([TRIAL])


def _number(line: str) -> float | None:
    """The number that ``line`` is as JSON; None where it is none."""
    try:
        value = json.loads(line)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if plain else None
    except (ValueError, OverflowError, RecursionError):
        return None
