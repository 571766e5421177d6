"""Files of rows -> rows as plain dicts, streamed: jsonl, JSON of several shapes, csv, Parquet, or a folder saved by `datasets`.

In: a path. Out: `Table`: the column names, and (place, values) per row, with a reason instead of values for a row that cannot be parsed.
The content decides the kind of a file; its name only distinguishes csv and jsonl from other text. Nothing is cached, fetched or unpickled.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data import json_stream
from qlora_lite.data.csv_rows import open_csv
from qlora_lite.data.files import EXPECTED, data_suffix, open_data_file, open_text
from qlora_lite.data.json_documents import (
    HOW_READ,
    RECORDS,
    DocumentKind,
    document_kind,
    document_rows,
    not_a_row,
    row_of,
)
from qlora_lite.data.rows import short
from qlora_lite.errors import DataError
from qlora_lite.files.json_text import RepeatedKey, parse_json
from qlora_lite.files.names import inside
from qlora_lite.files.text_file import NotText
from qlora_lite.foreign import foreign
from qlora_lite.limits import COLUMNS, JSON_BYTES, JSON_DEPTH, ROW_BYTES

FileKind = Literal["json", "jsonl", "csv", "parquet", "saved"] | DocumentKind

READ_ROWS = 256  # rows of a Parquet file or a saved folder in memory at a time
SCANNED_ROWS = 10_000  # rows scanned to find the columns
_PLAIN_TEXT = (".txt", ".text", ".md")
_LINES = (".jsonl", ".ndjson")
_PEEK_BYTES = 2**20  # the first line of a jsonl file without a jsonl name must end within these

Rows = Iterator[tuple[str, dict[str, Any] | str]]  # (place, such as "line 7"; values, or the reason why there are none)


@dataclass(frozen=True)
class Table:
    """Rows that can be read once. `columns` are those of the first row if rows may differ (JSON)."""

    columns: tuple[str, ...]
    rows: Rows
    notes: tuple[str, ...] = ()  # peculiarities of reading the file


def file_kind(path: Path) -> FileKind:
    """Return the kind of the file, judged by its content; csv is judged by its name. Raises DataError."""
    if path.is_dir():
        return "saved"
    with open_data_file(path) as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    suffix = data_suffix(path)
    with open_text(path) as opened:
        start = opened.stream.read(_PEEK_BYTES)
    if suffix in (".csv", ".tsv"):
        return "csv"
    text = start.lstrip()
    first, _, rest = text.partition(b"\n")
    if suffix in _PLAIN_TEXT and not text.startswith((b"{", b"[")):
        raise DataError(
            f'{path}: plain text. Convert it to rows: a .jsonl file with a line {{"text": "..."}} for every text.'
        )
    if suffix in _LINES:
        return _kind_of_lines(path, first, rest, is_whole=len(start) < _PEEK_BYTES)
    if text.startswith(b"["):
        return "json"
    if rest.strip() and _are_rows(text.split(b"\n"), is_whole=len(start) < _PEEK_BYTES):
        return "jsonl"
    kind = document_kind(path)
    return "jsonl" if kind == "objects" and not rest.strip() else kind


def open_table(path: Path, kind: FileKind) -> Table:
    """Open a file of rows. Raises DataError for an unreadable file, now or while its rows are read."""
    match kind:
        case "csv":
            header, rows = open_csv(path)
            return Table(tuple(name for name in header.names if name), rows, header.notes)
        case "parquet":
            return _parquet_table(path)
        case "saved":
            return _saved_table(path)
        case "jsonl":
            return _table_of_objects(path, _jsonl_rows(path), ())
        case "json":
            return _table_of_objects(path, _json_rows(path), ())
        case _:
            assert kind != "squad"
            return _table_of_objects(path, document_rows(path, kind), (HOW_READ[kind],))


def _kind_of_lines(path: Path, first: bytes, rest: bytes, *, is_whole: bool) -> FileKind:
    """Return the kind of a file named jsonl: one row per line, JSON over several lines, or one document on one line."""
    if first.startswith(b"[") and not _is_json(first):
        return "json"
    if first.rstrip() == b"{":
        return document_kind(path)
    if first.startswith(b"{") and not rest.strip() and is_whole and _is_json(first):
        kind = document_kind(path)
        return kind if kind in ("wrapped", "columns", "split", "index") else "jsonl"
    return "jsonl"


def _are_rows(lines: list[bytes], *, is_whole: bool) -> bool:
    """Whether at least half of the lines are complete JSON objects.

    A document over several lines can contain such a line too: its last row, if each row has a line.
    """
    whole_lines = [line.rstrip() for line in (lines if is_whole else lines[:-1])]
    num_lines = sum(map(bool, whole_lines))
    num_rows = sum(line.startswith(b"{") and line.endswith(b"}") and _is_json(line) for line in whole_lines)
    return num_rows > 0 and 2 * num_rows >= num_lines


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _table_of_objects(path: Path, rows: Rows, notes: tuple[str, ...]) -> Table:
    seen = []
    for place, values in rows:
        seen.append((place, values))
        if isinstance(values, dict):
            return Table(tuple(values), chain(seen, rows), notes)
        if len(seen) == SCANNED_ROWS:
            break
    if not seen:
        raise DataError(f"{path}: no rows. {EXPECTED}")
    place, problem = seen[0]
    hint = f"{RECORDS}. " if problem == not_a_row([]) else ""
    raise DataError(f"{path}: {place}: {problem}; no valid row among the first {len(seen)}. {hint}{EXPECTED}")


def _jsonl_rows(path: Path) -> Rows:
    with open_text(path) as text:
        number = 0
        while line := text.stream.readline(ROW_BYTES):
            number += 1
            if len(line) == ROW_BYTES:
                raise DataError(f"{path}: line {number} is longer than {ROW_BYTES:,} bytes. Is this jsonl?")
            if line.strip():
                yield f"line {number}", _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        values = parse_json(line, unique_keys=True)
    except (NotText, RepeatedKey) as error:
        return str(error)
    except ValueError as error:  # also for numbers of many thousand digits
        return f"not JSON: {str(error)[:100]}"
    return values if isinstance(values, dict) else not_a_row(values)


def _json_rows(path: Path) -> Rows:
    events = json_stream.read_events(path)
    next(events)  # the list
    for number, (event, value) in enumerate(json_stream.items(events), start=1):
        yield f"row {number}", row_of(path, event, value, events)
    for _ in events:  # read on: text after the list is an error
        pass


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if len(columns) > COLUMNS:
        raise DataError(f"{path}: {len(columns):,} columns, allowed {COLUMNS:,}. Remove unused columns.")
    repeated = [f'"{short(name)}"' for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: several columns are named {', '.join(repeated[:5])}, which is ambiguous. Rename or remove all but one."
        )


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet

    with _as_data_error(path, "Parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        return Table(tuple(file.schema_arrow.names), _parquet_rows(path, file))


def _parquet_rows(path: Path, file: Any) -> Rows:
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
    with _as_data_error(path, "a folder saved by `datasets`"):
        dataset = datasets.load_from_disk(str(path), keep_in_memory=False)
        if isinstance(dataset, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in dataset)
            raise DataError(f"{path}: has several splits. Choose one: {splits}")
        dataset.data.table.validate(full=True)  # Arrow trusts every offset in a file and would read elsewhere in memory
        return Table(tuple(dataset.column_names), _saved_rows(path, dataset.with_format(None)))


def _check_saved_names(path: Path) -> None:
    """Refuse files outside the folder in its state.json, which `datasets` would open."""
    state = path / "state.json"
    if not state.is_file():  # several splits, or not a saved folder: reported later
        return
    try:
        if state.stat().st_size > JSON_BYTES:
            raise DataError(f"{state}: larger than {JSON_BYTES:,} bytes, too large for a file of this kind.")
        names = [file["filename"] for file in parse_json(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: lists no files ({type(error).__name__}: {error}). {EXPECTED}") from error
    for name in names:
        inside(path, name, named_by=str(state))


def _saved_rows(path: Path, dataset: Any) -> Rows:
    with _as_data_error(path, "a folder saved by `datasets`"):
        for number, values in enumerate(dataset, start=1):
            yield f"row {number}", _without_nulls(values)


def _without_nulls(value: Any, depth: int = 0) -> Any:
    """Remove the None values that Arrow adds: it gives every object of a column the keys of all objects."""
    if depth > JSON_DEPTH:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
    if isinstance(value, dict):
        return {key: _without_nulls(inner, depth + 1) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def _as_data_error(path: Path, format: str) -> AbstractContextManager[None]:
    """Convert errors of other libraries' readers to one clear DataError."""
    return foreign(lambda reason: DataError(f"{path}: cannot be read as {format}: {reason}. {EXPECTED}"))
