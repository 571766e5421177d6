"""One data file, or several with weights -> usable rows, streamed; bad rows are counted and named.

In: paths, and a format or "auto". Out: `Mix`, which yields the rows of all files, one file after the other. Every file is read
completely before training, which detects a bad row in its last line; iterating reads it again.

Weights: a file with n usable rows and weight w gives round(w * n) rows: every row floor(w) times, and a sample for the rest. The sample
is drawn once from a fixed seed, so runs with any train.seed train on the same rows, in every epoch.
A limit on the number of rows is divided in proportion to the rows of each file; each gives its first rows.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lite.data.columns import Renamer, find_format_of_rows
from qlora_lite.data.files import data_suffix, hash_file, how_read
from qlora_lite.data.formats import FORMATS, read_row, unused_columns
from qlora_lite.data.rows import BadRow, Row, short
from qlora_lite.data.squad import read_questions
from qlora_lite.data.tables import FileKind, file_kind, open_table
from qlora_lite.data.turn_flags import FlagNotes
from qlora_lite.errors import DataError
from qlora_lite.limits import COLUMNS

NUM_NAMED = 20  # bad rows kept by name
_SAMPLE_SEED = 0x51A7
_IDS_COMPARED = 1_000_000  # ids of a file checked for repeats

# A path, or (path, weight) of several files.
Source = str | os.PathLike[str] | Sequence[tuple[str | os.PathLike[str], float]]


@dataclass(frozen=True)
class RowFile:
    """A checked file. Iterating reads it again and yields its `num_rows` usable rows in file order."""

    path: Path
    kind: FileKind
    format: str
    num_rows: int
    num_bad: int
    bad: tuple[str, ...]  # the first 20 bad rows, named, with reasons
    unused: tuple[str, ...]  # unused columns
    notes: tuple[str, ...] = ()  # peculiarities of reading the file

    def __iter__(self) -> Iterator[Row]:
        return (row for row, _ in _read(self.path, self.kind, self.format) if not isinstance(row, BadRow))


@dataclass(frozen=True)
class Mix:
    """Checked files, and the number of times each row is taken. Iterating yields `num_rows` rows."""

    files: tuple[RowFile, ...]
    times_taken: tuple[np.ndarray, ...]  # per file: int64 [its rows]
    num_left_out: int  # usable rows beyond the requested number

    def __iter__(self) -> Iterator[Row]:
        for file, times in zip(self.files, self.times_taken, strict=True):
            last = int(np.flatnonzero(times)[-1]) if times.any() else -1
            for row, num_times in zip(file, times[: last + 1].tolist(), strict=False):  # stops after the last one taken
                named = row if len(self.files) == 1 else replace(row, id=f"{file.path.name} {row.id}")
                yield from (named for _ in range(num_times))

    @property
    def num_rows(self) -> int:
        return int(sum(times.sum() for times in self.times_taken))

    @property
    def names(self) -> str:
        """The files, for messages."""
        return ", ".join(str(file.path) for file in self.files)

    @property
    def num_bad(self) -> int:
        return sum(file.num_bad for file in self.files)

    @property
    def bad(self) -> tuple[str, ...]:
        """The first bad rows, named."""
        if len(self.files) == 1:
            return self.files[0].bad
        return tuple(f"{file.path.name} {bad}" for file in self.files for bad in file.bad)[:NUM_NAMED]

    @property
    def notes(self) -> tuple[str, ...]:
        """Peculiarities of reading the files, and their unused columns, one sentence each."""
        notes = []
        for file in self.files:
            notes += [f"{file.path.name}: {note}" for note in file.notes]
            if file.unused:
                names = ", ".join(short(name) for name in file.unused[:30])
                notes.append(f"{file.path.name}: unused columns: {names}")
        return tuple(notes)

    @property
    def format(self) -> str:
        """The formats of the files, without repetition."""
        return " and ".join(dict.fromkeys(file.format for file in self.files))


def read_mix(source: Source, *, format: str = "auto", num_rows: int | None = None, max_bad_share: float = 0.02) -> Mix:
    """Read and check every file of `source`, and choose the rows: all, or at most `num_rows`.

    Raises DataError when a file is unreadable, has no usable row, lacks a column of its format, or when more than
    `max_bad_share` (0 to 1) of its rows are bad; the message names the first few.
    """
    pairs = as_pairs(source)
    files = tuple(_check_file(path, format, max_bad_share) for path, _ in pairs)
    times = [_times(file.num_rows, weight) for file, (_, weight) in zip(files, pairs, strict=True)]
    totals = [int(file_times.sum()) for file_times in times]
    if sum(totals) == 0:
        raise DataError(
            f"data.train: the weights leave no row of {', '.join(str(path) for path, _ in pairs)}. Increase them"
        )
    num_taken = sum(totals) if num_rows is None else min(num_rows, sum(totals))
    shares = _shares(totals, num_taken)
    taken = tuple(_first(file_times, share) for file_times, share in zip(times, shares, strict=True))
    return Mix(files, taken, num_left_out=sum(totals) - num_taken)


def find_format(source: Source, *, format: str) -> tuple[str, str]:
    """Recognize the format of `source` from its first rows -> (format, reason); ("auto", reason) when files differ.

    Raises DataError when a file is unreadable or has no columns of a known format.
    """
    if format != "auto":
        return format, "asked for"
    formats = {path: _find_format(path, file_kind(path), "auto") for path, _ in as_pairs(source)}
    if len({name for name, _ in formats.values()}) > 1:
        return "auto", "; ".join(f"{path.name} is {name}: {reason}" for path, (name, reason) in formats.items())
    path, (name, reason) = next(iter(formats.items()))
    return name, f"{path.name}: {reason}"


def format_of_held_out(path: str | os.PathLike[str], *, format: str) -> str:
    """Return `format`, that of the training rows, if the file at `path` has its columns; else the format of its own columns.

    Raises DataError when the file is unreadable or has no columns of a known format.
    """
    path = Path(path)
    kind = file_kind(path)
    if format == "auto":
        return _find_format(path, kind, "auto")[0]
    has_format = format == "squad" if kind == "squad" else not isinstance(find_format_of_rows(path, kind, format), str)
    return format if has_format else _find_format(path, kind, "auto")[0]


def as_pairs(source: Source) -> list[tuple[Path, float]]:
    """Return (path, weight) of every file."""
    if isinstance(source, str | os.PathLike):
        return [(Path(source), 1.0)]
    return [(Path(path), weight) for path, weight in source]


def file_identity(path: Path) -> list[str]:
    """Return what determines the rows of a file or saved folder: its hashes and suffix. Raises DataError when it is unreadable."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".arrow", ".json"))
        return [text for file in files for text in (file.name, hash_file(file))]
    return [data_suffix(path), hash_file(path)]  # the suffix tells csv from tsv


def _check_file(path: Path, format: str, max_bad_share: float) -> RowFile:
    kind = file_kind(path)
    name, reason = _find_format(path, kind, format)
    num_rows, num_bad = 0, 0
    named: list[str] = []
    seen, rename = _RowNotes(), Renamer(name)
    for row, values in _read(path, kind, name, rename):
        seen.count(row, values)
        if not isinstance(row, BadRow):
            num_rows += 1
            continue
        num_bad += 1
        if len(named) < NUM_NAMED:
            named.append(str(row))
    if num_bad + num_rows == 0:
        problem = "no questions: data[].paragraphs[].qas[] is empty" if kind == "squad" else "no rows"
        raise DataError(f"{path}: {problem}.")
    if num_rows == 0 or num_bad > max_bad_share * (num_rows + num_bad):
        hint = f"\nIt is read as {name}, because {reason}; set data.format to change that." if kind != "squad" else ""
        raise DataError(too_many_bad(str(path), num_rows, num_bad, named, max_bad_share) + hint)
    unused = () if kind == "squad" else unused_columns(tuple(seen.columns), format=name)
    notes = (*_how_read(path, kind), *rename.sentences, *seen.sentences)
    return RowFile(path, kind, name, num_rows, num_bad, bad=tuple(named), unused=unused, notes=notes)


def _how_read(path: Path, kind: FileKind) -> tuple[str, ...]:
    """Return notes on the encoding, compression and shape of a file, if unusual."""
    text = "" if kind in ("parquet", "saved") else how_read(path)
    return ((text,) if text else ()) + (() if kind == "squad" else open_table(path, kind).notes)


class _RowNotes:
    """Collects the peculiarities of a file's rows, for the notes: repeated ids, flags of turns, unused columns."""

    def __init__(self) -> None:
        self.columns: dict[str, None] = {}
        self._flags = FlagNotes()
        self._ids: set[int] = set()  # hashes, since ids may be long
        self._num_repeated, self._repeated = 0, ""

    def count(self, row: Row | BadRow, values: dict[str, Any]) -> None:
        """Count one row and its columns."""
        if len(self.columns) < COLUMNS:
            self.columns.update(dict.fromkeys(values))
        self._flags.count(values)
        if isinstance(row, BadRow):
            return
        if hash(row.id) in self._ids:
            self._num_repeated += 1
            self._repeated = self._repeated or row.id
        elif len(self._ids) < _IDS_COMPARED:
            self._ids.add(hash(row.id))

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes; empty if nothing was unusual."""
        ids = f'rows with the id of an earlier row: {self._num_repeated:,}, the first "{short(self._repeated)}"; all are used'
        return (*((ids,) if self._num_repeated else ()), *self._flags.sentences)


def _find_format(path: Path, kind: FileKind, format: str) -> tuple[str, str]:
    """-> (format, reason)."""
    assert format in (*FORMATS, "auto"), format
    if kind == "squad":
        if format in ("auto", "squad"):
            return "squad", "nested, as SQuAD is published"
        raise DataError(
            f"{path}: one JSON object, which only SQuAD files are; {format} needs one object per row (json or jsonl)."
        )
    match = find_format_of_rows(path, kind, format)
    if isinstance(match, str):
        raise DataError(f"{path}: {match}. Rename the columns, or choose another data.format.")
    name, columns = match
    return name, f"it has the column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def _read(
    path: Path, kind: FileKind, format: str, rename: Renamer | None = None
) -> Iterator[tuple[Row | BadRow, dict[str, Any]]]:
    """Yield (row, its columns); {} for nested files and for rows that cannot be parsed."""
    if kind == "squad":
        yield from ((row, {}) for row in read_questions(path))
        return
    rename = rename or Renamer(format)
    for place, values in open_table(path, kind).rows:
        if isinstance(values, str):
            yield BadRow(place, values), {}
        else:
            values = rename(values)
            yield read_row(format, values, place), values


def too_many_bad(files: str, num_rows: int, num_bad: int, named: Sequence[str], max_bad_share: float) -> str:
    """Return the error text for `files` with `num_rows` usable rows and too many bad ones, the first of them named."""
    shown = [f"  {name}" for name in named[:5]]
    rest = [f"  ... and {num_bad - 5} more"] if num_bad > 5 else []
    total = num_rows + num_bad
    head = (
        f"{files}: {num_bad} of {total} rows cannot be used ({num_bad / total:.1%}, allowed {max_bad_share:.0%}). "
        f"Correct or remove them:"
    )
    return "\n".join([head, *shown, *rest])


def _times(num_rows: int, weight: float) -> np.ndarray:
    """Return how often each row of a file is taken: floor(weight) times, and a sample once more."""
    times = np.full(num_rows, math.floor(weight), dtype=np.int64)
    rest = round(weight * num_rows) - int(times.sum())
    generator = np.random.Generator(np.random.PCG64(_SAMPLE_SEED))
    times[generator.permutation(num_rows)[:rest]] += 1
    return times


def _first(times: np.ndarray, num_taken: int) -> np.ndarray:
    """Limit `times` to the first `num_taken` rows in file order."""
    before = np.cumsum(times) - times
    return np.clip(num_taken - before, 0, times)


def _shares(totals: list[int], num_rows: int) -> list[int]:
    """Divide `num_rows` in proportion to `totals`; the largest remainders get the rounding surplus."""
    exact = [num_rows * total / sum(totals) for total in totals]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(totals)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: num_rows - sum(shares)]:
        shares[i] += 1
    return shares
