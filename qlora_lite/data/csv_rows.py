"""A csv file -> its header and rows, streamed; the delimiter is detected from the header.

In: a path. Out: the column names, notes on how the file is read, and (place, cells by name) per row, or a reason instead of the cells.

| delimiter | Excel's line `sep=;` before the header names it; otherwise the one of comma, tab, semicolon and | that gives known columns; |
|           | otherwise the only one that splits the header; otherwise a comma (a tab in a .tsv)                                         |
| header    | the first line that is not blank; a repeated name is refused; a column without a name is not read                          |
| quotes    | as in RFC 4180: a cell with a delimiter, a quote or a line break is quoted, and its quotes are doubled                      |

A row with a wrong quote on one line is a bad row. Over several lines the start of the next row would be a guess, so the file is refused.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_lite.data.files import EXPECTED, data_suffix, open_text, refuse_other_encodings
from qlora_lite.data.formats import are_known
from qlora_lite.data.rows import short
from qlora_lite.errors import DataError
from qlora_lite.foreign import foreign
from qlora_lite.limits import COLUMNS, ROW_BYTES, TEXT_CHARS

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_QUOTE_RULE = 'put the whole cell in quotes and write "" for each quote inside it'

CsvRow = tuple[str, dict[str, Any] | str]


@dataclass(frozen=True)
class Header:
    """The header: names by position ("" for a column that is not read), the delimiter, and notes."""

    names: tuple[str, ...]
    delimiter: str
    notes: tuple[str, ...]


def open_csv(path: Path) -> tuple[Header, Iterator[CsvRow]]:
    """-> (the header, the rows, which are read once). Raises DataError, now or while the rows are read."""
    csv.field_size_limit(4 * TEXT_CHARS)  # process-wide; the default of 131,072 is too small for long texts
    header_and_rows = _header_and_rows(path)
    header = next(header_and_rows)
    assert isinstance(header, Header)
    return header, header_and_rows  # type: ignore[return-value]


def _header_and_rows(path: Path) -> Iterator[Header | CsvRow]:
    with foreign(lambda reason: _unreadable(path, reason)), open_text(path) as text:
        try:
            lines = _lines(path, TextIOWrapper(text.stream, encoding="utf-8", newline=""))
            num_before, delimiter, first = _beginning(path, lines)
            note = f'the line "sep={delimiter}" names the delimiter' if delimiter else ""
            if not delimiter:
                delimiter, note = _detect_delimiter(path, first)
            reader = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
            try:
                names = next(reader)
            except csv.Error as error:
                raise _unreadable(path, f"line {num_before + 1}: {error}; {_QUOTE_RULE}") from error
            yield _header(path, names, num_before + 1, delimiter, note)
            yield from _rows(path, reader, [name.strip() and name for name in names], num_before)
        except UnicodeDecodeError:
            refuse_other_encodings(path)
            raise


def _beginning(path: Path, lines: Iterator[str]) -> tuple[int, str, str]:
    """-> (lines before the header, the delimiter in a line `sep=` or "", the header line)."""
    delimiter = ""
    for num_before, line in enumerate(lines):
        match = _SEP_LINE.fullmatch(line)
        if match and not delimiter:
            delimiter = match.group(1)
        elif line.strip():
            return num_before, delimiter, line
    raise DataError(f"{path}: no header: a csv file must begin with its column names. {EXPECTED}")


def _detect_delimiter(path: Path, line: str) -> tuple[str, str]:
    """Detect the delimiter from the header `line` -> (delimiter, note)."""
    usual = "\t" if data_suffix(path) == ".tsv" else ","
    cells = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in DELIMITERS}
    known = [delimiter for delimiter in DELIMITERS if are_known(cells[delimiter])]
    several = [delimiter for delimiter in DELIMITERS if len(cells[delimiter]) > 1]
    if usual in known or (not known and usual in several):
        return usual, ""
    detected = known[:1] or (several if len(several) == 1 else [])
    if not detected:
        return usual, ""
    return detected[0], f"cells are separated by {DELIMITERS[detected[0]]} (detected from the header)"


def _header(path: Path, names: Sequence[str], line: int, delimiter: str, note: str) -> Header:
    if len(names) > COLUMNS:
        raise DataError(f"{path}: {len(names):,} columns, allowed {COLUMNS:,}. Remove unused columns.")
    places: dict[str, list[int]] = {}
    for position, name in enumerate(names, start=1):
        places.setdefault(name.strip(), []).append(position)
    unnamed = places.pop("", [])
    repeated = [f'"{short(name)}" (columns {_listed(where)})' for name, where in places.items() if len(where) > 1]
    if repeated:
        raise DataError(
            f"{path}: line {line}: the header names {', '.join(repeated[:5])} more than once, which is ambiguous. "
            f"Rename or remove one of them."
        )
    if not places:
        raise DataError(f"{path}: line {line}: no column has a name. {EXPECTED}")
    notes = [note] if note else []
    notes += [f"columns without a name in the header are not read: {_listed(unnamed)}"] if unnamed else []
    return Header(tuple(name.strip() and name for name in names), delimiter, tuple(notes))


def _rows(path: Path, reader: Any, names: Sequence[str], num_before: int) -> Iterator[CsvRow]:
    number = 0
    while True:
        first_line = num_before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number, line = number + 1, num_before + reader.line_num
            if line > first_line or "unexpected end" in str(error):
                where = f"line {first_line}: a quote that opens in this row is not closed correctly"
                raise _unreadable(path, f"{where} (detected on line {line}: {error}); {_QUOTE_RULE}") from error
            yield f"row {number}", f"line {line}: wrong quotes ({error}); {_QUOTE_RULE}"
            continue
        if not cells:  # a blank line
            continue
        number += 1
        yield f"row {number}", _values(names, cells, first_line)


def _values(names: Sequence[str], cells: Sequence[str], line: int) -> dict[str, Any] | str:
    if len(cells) > len(names):
        return f"more cells than the {len(names)} of the header (line {line}); quote cells that contain the delimiter"
    if len(cells) < len(names):
        return f"only {len(cells)} cells, but the header has {len(names)} (line {line})"
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _lines(path: Path, text: TextIOWrapper) -> Iterator[str]:
    while line := text.readline(ROW_BYTES):
        if len(line) == ROW_BYTES:
            raise DataError(f"{path}: a line of more than {ROW_BYTES:,} characters. Is this csv?")
        yield line


def _listed(positions: Sequence[int]) -> str:
    numbers = [str(position) for position in positions[:10]]
    more = f" and {len(positions) - 10} more" if len(positions) > 10 else ""
    return (" and ".join(numbers) if len(numbers) == 2 else ", ".join(numbers)) + more


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: cannot be read as csv: {reason}. {EXPECTED}")
