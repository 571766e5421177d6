"""A data file, or several with weights -> usable rows, streamed; every other row is counted and named.

In: paths, and a format or "auto". Out: `Mix`, which yields the rows of all files, one file after the other. A file is read once whole
before anything is trained, so that a bad row in its last line is met now; iterating reads it again.

Weights: of a file with n usable rows and weight w, round(w * n) are taken: every row floor(w) times, and for the rest a sample. The sample
is drawn once from a fixed seed, so two runs, whatever their train.seed, train on the same rows, the same ones in every epoch.
A limit on the number of rows is shared out in proportion to what each file would give; each gives its first rows.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qlora_lite.data.files import hash_file
from qlora_lite.data.formats import FORMATS, find_columns, read_row, unused_columns
from qlora_lite.data.rows import BadRow, Row, short
from qlora_lite.data.squad import read_questions
from qlora_lite.data.tables import FileKind, file_kind, open_table
from qlora_lite.errors import DataError

NUM_NAMED = 20  # bad rows kept by name
_SAMPLE_SEED = 0x51A7

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
    bad: tuple[str, ...]  # the first 20 bad rows, named, with their reason
    unused: tuple[str, ...]  # columns that are not read

    def __iter__(self) -> Iterator[Row]:
        return (row for row in _read(self.path, self.kind, self.format) if not isinstance(row, BadRow))


@dataclass(frozen=True)
class Mix:
    """Checked files, and how often each of their rows is taken. Iterating yields `num_rows` rows."""

    files: tuple[RowFile, ...]
    times_taken: tuple[np.ndarray, ...]  # per file: int64 [its rows]
    num_left_out: int  # usable rows beyond the number that was asked for

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
        """What of the files is not read, a sentence each."""
        return tuple(
            f"{file.path.name}: columns that are not used: {', '.join(short(name) for name in file.unused[:30])}"
            for file in self.files
            if file.unused
        )

    @property
    def format(self) -> str:
        """The formats of the files, without repetition."""
        return " and ".join(dict.fromkeys(file.format for file in self.files))


def read_mix(source: Source, *, format: str = "auto", num_rows: int | None = None, max_bad_share: float = 0.02) -> Mix:
    """Read and check every file of `source`, and choose the rows: all, or at most `num_rows` of them.

    Raises DataError when a file cannot be read, has no usable row, lacks a column of its format, or when more than
    `max_bad_share` (0 to 1) of its rows are bad; the message names the first few.
    """
    pairs = as_pairs(source)
    files = tuple(_check_file(path, format, max_bad_share) for path, _ in pairs)
    times = [_times(file.num_rows, weight) for file, (_, weight) in zip(files, pairs, strict=True)]
    totals = [int(each.sum()) for each in times]
    if sum(totals) == 0:
        raise DataError(
            f"data.train: the weights leave no row of {', '.join(str(path) for path, _ in pairs)}. Raise them"
        )
    num_taken = sum(totals) if num_rows is None else min(num_rows, sum(totals))
    shares = _shares(totals, num_taken)
    taken = tuple(_first(each, share) for each, share in zip(times, shares, strict=True))
    return Mix(files, taken, num_left_out=sum(totals) - num_taken)


def find_format(source: Source, *, format: str) -> tuple[str, str]:
    """What the rows of `source` are, from the first of them -> (format, reason); ("auto", reason) when files differ.

    Raises DataError when a file cannot be read or has no columns of a known format (of the named one).
    """
    if format != "auto":
        return format, "asked for"
    found = {}
    for path, _ in as_pairs(source):
        found[path] = _find_format(path, file_kind(path), "auto")
    if len({name for name, _ in found.values()}) > 1:
        return "auto", "; ".join(f"{path.name} is {name}: {why}" for path, (name, why) in found.items())
    path, (name, why) = next(iter(found.items()))
    return name, f"{path.name}: {why}"


def format_of_held_out(path: str | os.PathLike[str], *, format: str) -> str:
    """`format`, that of the training rows, where the file at `path` has its columns; otherwise the one that its own columns say.

    Raises DataError when the file cannot be read or has no columns of a known format.
    """
    path = Path(path)
    kind = file_kind(path)
    if format == "auto":
        return _find_format(path, kind, "auto")[0]
    is_such = format == "squad" if kind == "squad" else not isinstance(_found(path, kind, format), str)
    return format if is_such else _find_format(path, kind, "auto")[0]


def as_pairs(source: Source) -> list[tuple[Path, float]]:
    """(path, weight) of every file."""
    if isinstance(source, str | os.PathLike):
        return [(Path(source), 1.0)]
    return [(Path(path), weight) for path, weight in source]


def file_identity(path: Path) -> list[str]:
    """What decides the rows of a file, or of a folder that `datasets` saved. Raises DataError when it cannot be read."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".arrow", ".json"))
        return [text for file in files for text in (file.name, hash_file(file))]
    return [path.suffix.lower(), hash_file(path)]  # the suffix tells csv from tsv


def _check_file(path: Path, format: str, max_bad_share: float) -> RowFile:
    kind = file_kind(path)
    name, _ = _find_format(path, kind, format)
    num_rows, num_bad = 0, 0
    named: list[str] = []
    for row in _read(path, kind, name):
        if not isinstance(row, BadRow):
            num_rows += 1
            continue
        num_bad += 1
        if len(named) < NUM_NAMED:
            named.append(str(row))
    if num_bad + num_rows == 0:
        what = "no questions: nothing in data[].paragraphs[].qas[]" if kind == "squad" else "no rows"
        raise DataError(f"{path}: {what}.")
    if num_rows == 0 or num_bad > max_bad_share * (num_rows + num_bad):
        raise DataError(too_many_bad(str(path), num_rows, num_bad, named, max_bad_share))
    unused = () if kind == "squad" else unused_columns(open_table(path, kind).columns, format=name)
    return RowFile(path, kind, name, num_rows=num_rows, num_bad=num_bad, bad=tuple(named), unused=unused)


def _find_format(path: Path, kind: FileKind, format: str) -> tuple[str, str]:
    """-> (format, why)."""
    assert format in (*FORMATS, "auto"), format
    if kind == "squad":
        if format in ("auto", "squad"):
            return "squad", "nested, as SQuAD is published"
        raise DataError(
            f"{path}: one JSON object, which only SQuAD files are; {format} is an object per row (json or jsonl)."
        )
    found = _found(path, kind, format)
    if isinstance(found, str):
        raise DataError(f"{path}: {found}. Rename the columns, or choose another data.format.")
    name, columns = found
    return name, f"it has the column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def _found(path: Path, kind: FileKind, format: str) -> tuple[str, tuple[str, ...]] | str:
    """What `find_columns` says of a file of rows."""
    return find_columns(open_table(path, kind).columns, format=format)


def _read(path: Path, kind: FileKind, format: str) -> Iterator[Row | BadRow]:
    if kind == "squad":
        yield from read_questions(path)
        return
    for place, values in open_table(path, kind).rows:
        yield BadRow(place, values) if isinstance(values, str) else read_row(format, values, place)


def too_many_bad(files: str, num_rows: int, num_bad: int, named: Sequence[str], max_bad_share: float) -> str:
    """What to say of `files` with `num_rows` usable rows and more bad ones than allowed, the first of them named."""
    shown = [f"  {name}" for name in named[:5]]
    rest = [f"  ... and {num_bad - 5} more"] if num_bad > 5 else []
    total = num_rows + num_bad
    head = (
        f"{files}: {num_bad} of {total} rows cannot be used ({num_bad / total:.1%}, allowed {max_bad_share:.0%}). "
        f"Mend or remove them:"
    )
    return "\n".join([head, *shown, *rest])


def _times(num_rows: int, weight: float) -> np.ndarray:
    """How often each row of a file is taken: floor(weight) times, and a sample of them once more."""
    times = np.full(num_rows, math.floor(weight), dtype=np.int64)
    rest = round(weight * num_rows) - int(times.sum())
    generator = np.random.Generator(np.random.PCG64(_SAMPLE_SEED))
    times[generator.permutation(num_rows)[:rest]] += 1
    return times


def _first(times: np.ndarray, num_taken: int) -> np.ndarray:
    """`times`, only until `num_taken` rows are taken in file order."""
    before = np.cumsum(times) - times
    return np.clip(num_taken - before, 0, times)


def _shares(totals: list[int], num_rows: int) -> list[int]:
    """`num_rows` shared out in proportion to `totals`; what rounding leaves goes to the largest remainders."""
    exact = [num_rows * total / sum(totals) for total in totals]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(totals)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: num_rows - sum(shares)]:
        shares[i] += 1
    return shares
