"""Files of rows -> rows as plain dicts, streamed: jsonl, a JSON list, csv, Parquet, or a folder that `datasets` saved.

In: a path. Out: `Table`: the names of its columns, and (place, values) per row; a row that cannot be parsed gives its reason instead.
What a file is, is decided by what is in it; its name only tells csv and jsonl from other text. Nothing is cached, fetched or unpickled.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data import json_stream
from qlora_lite.data.files import EXPECTED, open_data_file
from qlora_lite.data.rows import kind
from qlora_lite.errors import DataError
from qlora_lite.foreign import foreign
from qlora_lite.json_text import parse_json
from qlora_lite.limits import COLUMNS, JSON_BYTES, JSON_DEPTH, ROW_BYTES, TEXT_CHARS
from qlora_lite.paths import inside

FileKind = Literal["squad", "json", "jsonl", "csv", "parquet", "saved"]

READ_ROWS = 256  # rows of a Parquet file or a saved folder in memory at a time
_PLAIN_TEXT = (".txt", ".text", ".md")
_PEEK_BYTES = 2**20  # the first line of a jsonl file that is not called so must end within these


@dataclass(frozen=True)
class Table:
    """Rows that are read once. `columns` are those of the first row where rows may differ (JSON)."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[str, dict[str, Any] | str]]  # (its place, such as "line 7"; its values, or why there are none)


def file_kind(path: Path) -> FileKind:
    """What kind of file `path` is; "squad" is a JSON object, which only nested SQuAD is. Raises DataError."""
    if path.is_dir():
        return "saved"
    with open_data_file(path) as file:
        start = file.read(_PEEK_BYTES)
    if start.startswith(b"PAR1"):
        return "parquet"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "jsonl"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "json"
    if path.suffix.lower() in _PLAIN_TEXT and not text.startswith(b"{"):
        raise DataError(
            f'{path}: plain text. Make it rows: a .jsonl file with a line {{"text": "..."}} for every text.'
        )
    return "jsonl" if _begins_with_a_row(text) else "squad"


def open_table(path: Path, what: FileKind) -> Table:
    """Open a file of rows. Raises DataError when it cannot be read, now or while its rows are."""
    match what:
        case "csv":
            return _csv_table(path)
        case "parquet":
            return _parquet_table(path)
        case "saved":
            return _saved_table(path)
        case _:
            rows = _jsonl_rows(path) if what == "jsonl" else _json_rows(path)
            return _table_of_objects(path, rows)


def _begins_with_a_row(text: bytes) -> bool:
    """Whether the first line is a JSON object of its own, other than a whole SQuAD file."""
    line, newline, _ = text.partition(b"\n")
    if not line.startswith(b"{") or not (newline or len(text) < _PEEK_BYTES):
        return False
    try:
        values = parse_json(line)
        return bool(values) and "data" not in values
    except ValueError:
        return False


def _table_of_objects(path: Path, rows: Iterator[tuple[str, dict[str, Any] | str]]) -> Table:
    seen = []
    for place, values in rows:
        seen.append((place, values))
        if isinstance(values, dict):
            return Table(tuple(values), chain(seen, rows))
        if len(seen) == READ_ROWS:
            break
    if not seen:
        raise DataError(f"{path}: no rows. {EXPECTED}")
    place, problem = seen[0]
    raise DataError(f"{path}: {place}: {problem}, and no row in the {len(seen)} that were read. {EXPECTED}")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with open_data_file(path) as file:
        number = 0
        while line := file.readline(ROW_BYTES):
            number += 1
            if len(line) == ROW_BYTES:
                raise DataError(f"{path}: line {number} is longer than {ROW_BYTES:,} bytes. Is it jsonl?")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"line {number}", _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        values = parse_json(line)
    except ValueError as error:  # also bytes that are not UTF-8, and numbers of many thousand digits
        return f"not JSON: {str(error)[:100]}"
    return values if isinstance(values, dict) else _no_object(values)


def _no_object(values: Any) -> str:
    return f"expected an object, got {kind(values)}"


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    events = json_stream.read_events(path)
    next(events)  # the list
    for number, (event, value) in enumerate(json_stream.items(events), start=1):
        values = json_stream.build(path, event, value, events)
        yield f"row {number}", values if isinstance(values, dict) else _no_object(values)
    for _ in events:  # what follows the list is an error that only reading on finds
        pass


def _csv_table(path: Path) -> Table:
    csv.field_size_limit(4 * TEXT_CHARS)  # of the whole process; the default, 131,072, is less than a text may have
    rows = _csv_rows(path)
    _, header = next(rows)
    assert isinstance(header, dict)
    return Table(tuple(header), rows)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The header, as a row of its own, then every row."""
    with open_data_file(path) as file, _as_data_error(path, "csv"):
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(_lines(path, text), strict=True, delimiter=delimiter)
        header = list(reader.fieldnames or [])
        _check_columns(path, header)
        yield "line 1", dict.fromkeys(header)
        for number, values in enumerate(reader, start=1):
            missing = [name for name in header if values[name] is None]
            if None in values:  # DictReader's key for cells beyond the header
                yield f"row {number}", f"more cells than the {len(header)} of the header"
            elif missing:
                yield f"row {number}", f"only {len(header) - len(missing)} cells, the header has {len(header)}"
            else:
                yield f"row {number}", values


def _lines(path: Path, text: TextIOWrapper) -> Iterator[str]:
    while line := text.readline(ROW_BYTES):
        if len(line) == ROW_BYTES:
            raise DataError(f"{path}: a line of more than {ROW_BYTES:,} characters. Is it csv?")
        yield line


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if len(columns) > COLUMNS:
        raise DataError(f"{path}: {len(columns):,} columns, allowed {COLUMNS:,}. Leave out those that are not read.")


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet

    with _as_data_error(path, "Parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        return Table(tuple(file.schema_arrow.names), _parquet_rows(path, file))


def _parquet_rows(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any] | str]]:
    number = 0
    with _as_data_error(path, "Parquet"):
        for batch in file.iter_batches(batch_size=READ_ROWS):
            batch.validate(full=True)
            for values in batch.to_pylist():
                number += 1
                yield f"row {number}", _without_nulls(values)


def _saved_table(path: Path) -> Table:
    import datasets

    _check_saved_names(path)
    with _as_data_error(path, "a folder that `datasets` saved"):
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
        if isinstance(found, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in found)
            raise DataError(f"{path}: holds several splits. Name one of them: {splits}")
        found.data.table.validate(
            full=True
        )  # Arrow believes every offset in a file, and would read elsewhere in memory
        return Table(tuple(found.column_names), _saved_rows(path, found.with_format(None)))


def _check_saved_names(path: Path) -> None:
    """`datasets` opens whatever file its state.json names; only such as lie in the folder are read here."""
    state = path / "state.json"
    if not state.is_file():  # a folder of several splits, or none at all, is named below
        return
    try:
        if state.stat().st_size > JSON_BYTES:
            raise DataError(f"{state}: larger than {JSON_BYTES:,} bytes, which no file of this kind is.")
        named = [file["filename"] for file in parse_json(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: names no files ({type(error).__name__}: {error}). {EXPECTED}") from error
    for name in named:
        inside(path, name, named_by=str(state))


def _saved_rows(path: Path, dataset: Any) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with _as_data_error(path, "a folder that `datasets` saved"):
        for number, values in enumerate(dataset, start=1):
            yield f"row {number}", _without_nulls(values)


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Arrow gives every object in a column the keys of all of them; the keys that only others have come out as None."""
    if depth > JSON_DEPTH:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
    if isinstance(value, dict):
        return {key: _without_nulls(inner, depth + 1) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def _as_data_error(path: Path, what: str) -> AbstractContextManager[None]:
    """What the readers of other formats raise, as one clear error."""
    return foreign(lambda said: DataError(f"{path}: cannot be read as {what}: {said}. {EXPECTED}"))
