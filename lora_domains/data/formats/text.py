"""From bytes to text: byte order marks, UTF-8, and other encodings by what they decode to."""

import codecs
import re
from collections.abc import Sequence

from lora_domains.data.formats.located import File, Table
from lora_domains.errors import DataError

MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DETECTED_BYTES = 1 << 20
"""Bytes that a guess of the encoding reads at most."""
_WORDS = re.compile(r"[^\W\d_]+")
_SYMBOL_IN_WORD = re.compile(r"[^\W\d_][¡-¶¸-¿×÷][^\W\d_]")


def decode(file: File) -> tuple[str, list[str]]:
    """The text of a file, and a note where it is not UTF-8.

    Raises DataError for an empty file, and with the line and byte where nothing fits.
    """
    raw, notes = file.raw, []
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    if file.reading.encoding:
        text = _named(file, file.reading.encoding)
    elif mark and mark != codecs.BOM_UTF8:
        text, notes = _named(file, MARKS[mark]), [MARKS[mark].upper()]
    else:
        text, notes = _utf8(file, len(mark))
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError(
            where=str(file.path), expected="rows", found="an empty file", hint="Check the export."
        )
    return text, notes


def _utf8(file: File, start: int) -> tuple[str, list[str]]:
    raw, notes, guess = file.raw, [], None
    try:
        text = raw[start:].decode("utf-8")
        offset, found = raw.find(b"\0"), "a NUL byte (UTF-16, or not a text file)"
    except UnicodeDecodeError as error:
        text, offset, found = "", start + error.start, "another encoding"
        # Sequences that are UTF-8, beside bytes that are not: a broken file, not another encoding.
        if start or (re.search(rb"[\xc3-\xf4][\x80-\xbf]", raw) and _mostly_utf8(raw)):
            found = "bytes that are not, in a file that is otherwise"
        elif b"\0" not in raw:
            guess = _guess(raw)
    if guess:
        text, notes, offset = raw.decode(guess), [f"encoding {guess}, detected"], -1
    if offset >= 0:
        raise _not_utf8(file, offset, found)
    return text, notes


def _mostly_utf8(raw: bytes) -> bool:
    """Whether most characters that are not ASCII are written as UTF-8."""
    decoded = raw.decode("utf-8", errors="replace")
    broken = decoded.count("\ufffd")
    return sum(letter > "\x7f" for letter in decoded) - broken >= broken


def _guess(raw: bytes) -> str | None:
    """The encoding whose text reads best; None where none does.

    Detectors take short German for Big5 and French for Polish, so that words mostly in ASCII
    letters are first read as Western European; what makes no words then is left to the detector.
    """
    from charset_normalizer import from_bytes

    lines = [line for line in raw.splitlines() if not line.isascii()]
    sample = b"\n".join(lines)[:DETECTED_BYTES]
    if _western(sample) and _decodes(raw, "cp1252"):
        return "cp1252"
    best = from_bytes(sample, cp_exclusion=["utf_7", "cp1252", "latin_1"]).best()
    return best.encoding if best and _decodes(raw, best.encoding) else None


def _western(sample: bytes) -> bool:
    """Whether ``sample`` reads as words in Latin letters, none with a symbol inside."""
    text = sample.decode("cp1252", errors="replace")
    marked = [w for w in _WORDS.findall(text) if not w.isascii() and len(w) > 2]
    ascii_letters = sum(letter.isascii() for word in marked for letter in word)
    letters = sum(map(len, marked))
    return (
        "\ufffd" not in text and not _SYMBOL_IN_WORD.search(text) and 2 * ascii_letters >= letters
    )


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _named(file: File, encoding: str) -> str:
    try:
        return file.raw.decode("utf-8-sig" if encoding.lower() == "utf-8" else encoding)
    except LookupError:
        wrong, offset = f"unknown encoding {encoding!r}", 0
    except UnicodeError as error:
        wrong, offset = f"bytes that are not {encoding}", getattr(error, "start", 0)
    line = file.raw.count(b"\n", 0, offset) + 1
    raise DataError(
        where=f"{file.path}, line {line}, byte {offset}",
        expected=f"text in {encoding}",
        found=wrong,
        hint="Leave --encoding out, or name the one it was saved in: utf-8, cp1252, …",
    ) from None


def _not_utf8(file: File, offset: int, found: str) -> DataError:
    path = file.path
    encoding = "UTF-16" if "NUL" in found else "WINDOWS-1252"
    return DataError(
        where=f"{path}, line {file.raw.count(bytes([10]), 0, offset) + 1}, byte {offset}",
        expected="text in UTF-8",
        found=found,
        hint=f"Name its encoding (--encoding), save it as UTF-8, or: iconv -f {encoding} "
        f"-t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
    )


def read_lines(file: File) -> Table:
    """Each line that is not blank, as a row with the column ``text``."""
    text, notes = decode(file)
    lines: Sequence[str] = text.splitlines()
    rows = enumerate(lines, 1)
    return Table([(f"line {n}", {"text": line}) for n, line in rows if line.strip()], notes)
