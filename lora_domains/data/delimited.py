"""Text files: their encoding, lines, and tables of delimited cells (CSV, TSV).

Encodings, delimiters and quotes are found by trying them.
"""

import codecs
import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lora_domains.data.source import File, Located, Table, check_kind, places
from lora_domains.errors import DataError, listed, number_of

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
    check_kind(file)
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
        if start or mostly_utf8(raw):
            found = "bytes that are not, in a file that is otherwise"
        elif b"\0" not in raw:
            guess = guess_encoding(raw)
    if guess:
        text, notes, offset = raw.decode(guess), [f"encoding {guess}, detected"], -1
    if offset >= 0:
        raise _not_utf8(file, offset, found)
    return text, notes


def mostly_utf8(raw: bytes) -> bool:
    """Whether most of its characters that are not ASCII are written as UTF-8, and some are."""
    if not re.search(rb"[\xc3-\xf4][\x80-\xbf]", raw):
        return False
    decoded = raw.decode("utf-8", errors="replace")
    broken = decoded.count("\ufffd")
    return sum(letter > "\x7f" for letter in decoded) - broken >= broken


def guess_encoding(raw: bytes) -> str | None:
    """The encoding whose text reads best; None where none does.

    Detectors take short German for Big5 and French for Polish, so that words mostly in ASCII
    letters are first read as Western European; what makes no words then is left to the detector.
    """
    from charset_normalizer import from_bytes

    lines = [line for line in raw.splitlines() if not line.isascii()]
    sample = b"\n".join(lines)[:DETECTED_BYTES]
    if _western(sample) and decodes(raw, "cp1252"):
        return "cp1252"
    best = from_bytes(sample, cp_exclusion=["utf_7", "cp1252", "latin_1"]).best()
    return best.encoding if best and decodes(raw, best.encoding) else None


def _western(sample: bytes) -> bool:
    """Whether ``sample`` reads as words in Latin letters, none with a symbol inside."""
    text = sample.decode("cp1252", errors="replace")
    marked = [w for w in _WORDS.findall(text) if not w.isascii() and len(w) > 2]
    ascii_letters = sum(letter.isascii() for word in marked for letter in word)
    letters = sum(map(len, marked))
    return (
        "\ufffd" not in text and not _SYMBOL_IN_WORD.search(text) and 2 * ascii_letters >= letters
    )


def decodes(raw: bytes, encoding: str) -> bool:
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
    rows = [(f"line {n}", {"text": line}) for n, line in enumerate(lines, 1) if line.strip()]
    if blank := len(lines) - len(rows):
        notes.append(f"{number_of(blank, 'blank line')} left out")
    return Table(list(rows), notes)


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""The delimiters that are tried."""

LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

Record = tuple[int, int, list[str]]
"""First and last line of a row, and its cells."""


@dataclass
class Parsed:
    """A file's cells as one delimiter gives them."""

    delimiter: str
    header: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    ragged: list[str] = field(default_factory=list)
    error: str = ""
    """The rule of quoting that is broken in the row that begins on line ``broken``."""
    broken: int = 0

    @property
    def whole(self) -> bool:
        """Whether all rows have the cells of the header."""
        return not self.error and not self.ragged


def read_delimited(file: File) -> Table:
    """The rows, each with the line on which it begins: a quoted cell may contain line breaks.

    Raises DataError with the lines of rows that do not fit the header.
    """
    text, notes = decode(file)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    first, declared = declared_delimiter(text)
    head = "".join(text.split("\n", first + 1)[first : first + 1])
    parsed, noted = chosen(file, head, declared, lambda delimiter: _parse(text, delimiter, first))
    notes += noted
    if parsed.error and (unquoted := _without_quotes(text, parsed, first)):
        notes.append("quotes are read as text, because no cell is in quotes")
        parsed = unquoted
    _check(file, parsed)
    joined, maybe = _joined_lines(text, parsed)
    if maybe:
        notes.append(f"{maybe} quoted rows of several lines, each of which has all columns")
    if joined and (unquoted := _unquoted(text, parsed, joined, first)):
        notes.append("quotes are read as text, because no cell is in quotes")
        parsed = unquoted
    elif joined:
        begin, end = joined[0]
        raise DataError(
            where=f"{file.path}, line {begin}",
            expected="quoted cells that are closed in their row, with quotes inside them doubled",
            found=f"a quote that joins lines {begin} to {end}, each of which is a whole row",
            hint="Delete the stray quotes, or double them inside a quoted cell.",
        )
    _check_header_once(file, parsed)
    rows: list[Located] = [
        (f"line {line}", dict(zip(parsed.header, cells, strict=True)))
        for line, _, cells in parsed.records
    ]
    return Table(rows, notes, parsed.delimiter)


def chosen(
    file: File, head: str, declared: str | None, parse: Callable[[str], Parsed]
) -> tuple[Parsed, list[str]]:
    """What ``parse`` makes of a table by its delimiter, and a note where that was detected.

    ``head`` is the line of the header, and ``declared`` the delimiter that one before it declares.
    """
    usual = "\t" if file.suffix == ".tsv" else ","
    given = file.reading.delimiter or declared
    parsed = parse(given or usual)
    if given is not None:
        return parsed, []
    parsed, others = _best(head, parsed, parse)
    if parsed.delimiter != usual:
        return parsed, [f"separated by {NAMES[parsed.delimiter]}, detected"]
    if others:
        return parsed, [f"separated by {NAMES[usual]}; {others} would fit too (--delimiter)"]
    return parsed, []


def declared_delimiter(text: str) -> tuple[int, str | None]:
    """(lines before the header, the delimiter that they declare), as Excel reads ``sep=;``."""
    line = text.split("\n", 1)[0].strip()
    if line.lower().startswith("sep=") and len(line) == 5:
        return 1, line[4]
    return (1, "\t") if line.lower() == "sep=" and "\t" in text.split("\n", 1)[0] else (0, None)


def _parse(text: str, delimiter: str, first: int, *, quoted: bool = True) -> Parsed:
    # io.StringIO would hold the text once more, in four bytes for each character.
    lines = (line[0] for line in LINE.finditer(text))
    parsed = Parsed(delimiter)
    parsed.records += records(lines, parsed, first, quoted=quoted)
    return parsed


def records(
    lines: Iterable[str], parsed: Parsed, first: int, *, quoted: bool = True
) -> Iterator[Record]:
    """The rows under the header in ``lines``; what is wrong with others is noted in ``parsed``."""
    begins = 1
    rows = csv.reader(
        lines, delimiter=parsed.delimiter, strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )  # fmt: skip
    header = True
    try:
        for cells in rows:
            if not cells or begins <= first:
                pass
            elif header:
                parsed.header, header = [cell.strip() for cell in cells], False
            elif len(cells) != len(parsed.header):
                parsed.ragged.append(f"line {begins} has {len(cells)}")
            else:
                yield begins, rows.line_num, cells
            begins = rows.line_num + 1
    except csv.Error as error:
        parsed.error, parsed.broken = str(error), begins  # it names the rule, never the cell


def _best(head: str, usual: Parsed, parse: Callable[[str], Parsed]) -> tuple[Parsed, str]:
    """The parse that fits, and the names of other delimiters that fit as well.

    The usual delimiter stays unless it makes one column, or rows that do not fit.
    """
    width = len(usual.header)
    tried = [parse(d) for d in NAMES if d != usual.delimiter and d in head]
    tried = [one for one in tried if len(one.header) > 1]
    whole = [one for one in tried if one.whole and one.records]
    if usual.whole and width > 1:
        return usual, " and ".join(NAMES[one.delimiter] for one in whole)
    if width > 1 and not whole:
        return usual, ""
    # Without any row that fits, the delimiter is a part of the one column's name.
    tried = [one for one in tried if one.records or one.error]
    return max(whole or tried or [usual], key=lambda one: len(one.header)), ""


def _check(file: File, parsed: Parsed) -> None:
    """Raise DataError for a header or rows that cannot be used."""
    twice = [name for name, n in Counter(parsed.header).items() if name and n > 1]
    by = f" separated by {NAMES.get(parsed.delimiter, repr(parsed.delimiter))}"
    if twice:
        raise DataError(
            where=f"{file.path}, line 1",
            expected=f"a header of distinct names{by}",
            found=f"{len(twice)} of {len(parsed.header)} names more than once",
            hint="Rename the columns.",
        )
    if parsed.error:
        raise DataError(
            where=f"{file.path}, the row beginning on line {parsed.broken}",
            expected="quoted cells that are closed, with the quotes inside them doubled",
            found=parsed.error,
            hint='Write "a ""quoted"" word", or export the table again.',
        )
    if parsed.ragged:
        width = len(parsed.header)
        hint = "Quote cells that contain the separator, or name another one: --delimiter."
        if width == 1 and not parsed.records:
            hint = "Delete the lines above the header, or name the separator: --delimiter."
        raise DataError(
            where=str(file.path),
            expected=f"{width} {'column' if width == 1 else 'columns'}{by} in every row",
            found=places(parsed.ragged, "row"),
            hint=hint,
        )
    if not parsed.records:
        raise DataError(
            where=str(file.path), expected="rows under the header",
            found="only the header: no rows", hint="Check the export.",
        )  # fmt: skip


def _check_header_once(file: File, parsed: Parsed) -> None:
    """Raise DataError where the header stands among the rows, as ``cat a.csv b.csv`` leaves it."""
    again = [
        f"line {line}"
        for line, _, cells in parsed.records
        if len(cells) > 1 and [cell.strip("\ufeff \t") for cell in cells] == parsed.header
    ]
    if again:
        raise DataError(
            where=f"{file.path}, {again[0]}",
            expected="the header once, on the first line",
            found="the header again" + (f", and on {listed(again[1:])}" if again[1:] else ""),
            hint="Delete it there: files joined by cat keep the header of each.",
        )


# ── Quotes that are text ────────────────────────────────────────────────────────────────────────


def _joined_lines(text: str, parsed: Parsed) -> tuple[list[tuple[int, int]], int]:
    """(first and last line of rows that a stray quote made of several, how many others may be).

    A quoted cell may have line breaks. But where each of its lines has all columns, and one of them
    holds only values that the other rows repeat (a label), a quote that belongs to the text has
    swallowed rows.
    """
    width = len(parsed.header)
    spans = [(a, b) for a, b, _ in parsed.records if b > a]
    if width < 2 or not spans:
        return [], 0
    lines = re.split(r"\r\n|\r|\n", text)
    single = [cells for a, b, cells in parsed.records if a == b]
    values = [{cells[c] for cells in single} - {""} for c in range(width)]
    repeated = [c for c in range(width) if len(single) >= 8 and 2 * len(values[c]) <= len(single)]
    joined, maybe = [], 0
    for begin, end in spans:
        apart = [line.split(parsed.delimiter) for line in lines[begin - 1 : end]]
        if all(len(cells) == width for cells in apart):
            if any(all(cells[c] in values[c] for cells in apart) for c in repeated):
                joined.append((begin, end))
            else:
                maybe += 1
    return joined, maybe


def _without_quotes(text: str, parsed: Parsed, first: int) -> Parsed | None:
    """The rows of tabs with quotes as text, where every line is a row and no cell is in quotes.

    Programs that write tabs often quote nothing; those that write commas must.
    """
    if parsed.delimiter != "\t":
        return None
    unquoted = _parse(text, parsed.delimiter, first, quoted=False)
    cells = [cell for _, _, row in unquoted.records for cell in (*row, *unquoted.header)]
    quoted = any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
    return unquoted if unquoted.whole and unquoted.records and not quoted else None


def _unquoted(
    text: str, parsed: Parsed, joined: list[tuple[int, int]], first: int
) -> Parsed | None:
    """The rows with quotes as text, where this changes none but the ``joined`` ones."""
    unquoted = _parse(text, parsed.delimiter, first, quoted=False)
    if not unquoted.whole:
        return None
    within = {line for begin, end in joined for line in range(begin, end + 1)}
    kept = [record for record in unquoted.records if record[0] not in within]
    begins = {begin for begin, _ in joined}
    return unquoted if kept == [r for r in parsed.records if r[0] not in begins] else None
