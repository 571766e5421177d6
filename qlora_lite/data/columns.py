"""The format of a file's rows, decided by a majority of them; and column names with small differences in spelling.

In: a file of rows. Out: (format, the columns that decide it). Each of the first SCANNED_ROWS rows votes for the format of its own
columns (a blank cell does not count), so a row with a missing or an extra column does not affect the others: it is a bad row, or the
column is unused. If no row votes (for example, all answers are blank), the names of all columns decide.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_lite.data.formats import FORMATS, KNOWN_NAMES, find_columns, known_name, names_of, renamed
from qlora_lite.data.rows import short
from qlora_lite.data.tables import SCANNED_ROWS, FileKind, open_table
from qlora_lite.limits import COLUMNS

_SHAPES_KEPT = 1000


def find_format_of_rows(path: Path, kind: FileKind, format: str) -> tuple[str, tuple[str, ...]] | str:
    """-> (format, the columns that decide it) for "auto" or a named format; or the problem, as a sentence. Raises DataError."""
    assert kind != "squad"
    table = open_table(path, kind)
    shapes: Counter[tuple[str, ...]] = Counter()  # names of the known columns that a row has -> number of rows
    names: dict[str, None] = dict.fromkeys(table.columns)
    for number, (_, values) in enumerate(table.rows, start=1):
        if isinstance(values, dict):
            given = tuple(
                name for name, value in values.items() if known_name(name) in KNOWN_NAMES and not _is_blank(value)
            )
            shapes[given] += len(shapes) < _SHAPES_KEPT or given in shapes
            if len(names) < COLUMNS:
                names.update(dict.fromkeys(values))
        if number >= SCANNED_ROWS and shapes:
            break
    return _most_votes(shapes, format) or _by_names(tuple(names), kind, format)


def _most_votes(shapes: Mapping[tuple[str, ...], int], format: str) -> tuple[str, tuple[str, ...]] | None:
    votes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for shape, num_rows in shapes.items():
        vote = _match(shape, format)
        if not isinstance(vote, str):
            votes[vote] += num_rows
    if not votes:
        return None
    by_format: Counter[str] = Counter()
    for (name, _), num_rows in votes.items():
        by_format[name] += num_rows
    winner = max(by_format, key=lambda name: (by_format[name], -FORMATS.index(name)))
    return max((vote for vote in votes if vote[0] == winner), key=votes.__getitem__)


def _by_names(names: tuple[str, ...], kind: FileKind, format: str) -> tuple[str, tuple[str, ...]] | str:
    match = _match(names, format)
    if not isinstance(match, str):
        return match
    counts = Counter(known_name(name) for name in names if known_name(name) in KNOWN_NAMES)
    unclear = [f'"{short(name)}"' for name in names if counts[known_name(name)] > 1]
    hint = f". {', '.join(unclear)} differ only in capitals or spaces, which is ambiguous" if unclear else ""
    return match + hint + (". The first line of a csv file must name its columns" if kind == "csv" else "")


def _match(names: Iterable[str], format: str) -> tuple[str, tuple[str, ...]] | str:
    names = list(names)
    exact = find_columns(names, format=format)
    if not isinstance(exact, str):
        return exact
    known = renamed(names)
    match = find_columns([known.get(name, name) for name in names], format=format) if known else exact
    return exact if isinstance(match, str) else match


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


class Renamer:
    """Renames the columns of a format to their exact names: `Question` -> `question`."""

    def __init__(self, format: str) -> None:
        self._wanted = names_of(format)
        self._by_names: dict[tuple[str, ...], dict[str, str]] = {}  # names of a row -> those to change
        self.renamed: dict[str, str] = {}  # of all rows so far

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the row with known column names, otherwise unchanged."""
        names = tuple(values)
        change = self._by_names.get(names)
        if change is None:
            change = {name: known for name, known in renamed(names).items() if known in self._wanted}
            if len(self._by_names) < _SHAPES_KEPT:
                self._by_names[names] = change
                self.renamed |= change
        return {change.get(name, name): value for name, value in values.items()} if change else values

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes on renamed columns."""
        pairs = [f'"{short(name)}" as {known}' for name, known in list(self.renamed.items())[:30]]
        return (f"columns read under their standard names: {', '.join(pairs)}",) if pairs else ()
