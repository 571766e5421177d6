"""A file of one JSON object -> its kind (nested SQuAD, or rows in a shape that libraries write) and its rows.

In: a path. Out: its kind, and (place, values) per row, streamed.

| kind    | shape                                             | written by                                                 |
|---------|---------------------------------------------------|------------------------------------------------------------|
| squad   | {"data": [{"paragraphs": [...]}]}                 | SQuAD; also any unknown shape, for the error messages      |
| wrapped | {"data": [row, row]}, with any key                | APIs; pandas' to_json(orient="table")                      |
| columns | {"question": {"0": ..., "1": ...}, "answer": ...} | pandas' to_json() by default; lists instead: to_dict       |
| split   | {"columns": [...], "data": [[...], [...]]}        | pandas' to_json(orient="split")                            |
| index   | {"0": row, "1": row}                              | pandas' to_json(orient="index")                            |
| objects | row row ..., each over several lines              | jq, json.dump(row, indent=2)                               |

Surprising: `columns` are read by one parser per column, in parallel, because the file stores one column after the other.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data import json_stream
from qlora_lite.data.files import EXPECTED
from qlora_lite.data.formats import KNOWN_NAMES, are_known, known_name
from qlora_lite.data.json_stream import Events, build, keys, skip_value
from qlora_lite.data.rows import kind as kind_of
from qlora_lite.data.rows import short
from qlora_lite.errors import DataError
from qlora_lite.files.json_text import RepeatedKey

DocumentKind = Literal["squad", "wrapped", "columns", "split", "index", "objects"]
HOW_READ = {
    "wrapped": "its rows are the list inside its one JSON object",
    "columns": "read by columns, as pandas' to_json() writes them",
    "split": 'read as pandas\' to_json(orient="split") writes it',
    "index": 'read as pandas\' to_json(orient="index") writes it',
    "objects": "read as a sequence of JSON objects",
}

_COLUMNS_AT_ONCE = 64
_FIRST_ITEMS = 8  # items of a list to inspect
_NUM_KEYS = 100  # keys of a row to inspect
RECORDS = 'With pandas: df.to_json(path, orient="records", lines=True)'
_LISTS_OF_OBJECTS = ("messages", "conversations", "prompt", "completion", "answers", "tools")  # in one row

Rows = Iterator[tuple[str, dict[str, Any] | str]]


def document_kind(path: Path) -> DocumentKind:
    """Return the kind of the JSON object in this file. Raises DataError when the file is not JSON."""
    with closing(json_stream.read_events(path, several=True)) as events:  # type: ignore[type-var]
        event, _ = next(events)
        return _kind(events) if event == "start_map" else "squad"


def document_rows(path: Path, kind: DocumentKind) -> Rows:
    """Yield the rows of a file of this kind (except squad). Raises DataError while they are read."""
    readers = {"wrapped": _wrapped, "columns": _by_columns, "split": _split, "index": _index, "objects": _objects}
    return readers[kind](path)


def row_of(path: Path, event: str, value: Any, events: Events) -> dict[str, Any] | str:
    """Return the row that begins with this event, or the reason why it is not a row."""
    try:
        values = build(path, event, value, events, unique_keys=True)
    except RepeatedKey as error:
        return str(error)
    return values if isinstance(values, dict) else not_a_row(values)


def not_a_row(values: Any) -> str:
    """Return the reason why a value is not a row."""
    return f"expected an object, got {kind_of(values)}"


def _kind(events: Events) -> DocumentKind:
    seen: list[str] = []
    plain: list[str] = []  # keys of texts and numbers
    lists: list[str] = []  # keys of lists of texts and numbers: columns, unless a text or number is beside them
    for key in keys(events):
        event, _ = next(events)
        kind: DocumentKind | None = None
        if event == "start_array":
            kind, is_plain = _kind_by_list(key, events, has_columns="columns" in seen)
            if kind == "objects" and any(known_name(name) in KNOWN_NAMES for name in lists):
                kind = "columns"  # of lists, such as the answers of SQuAD's rows
            lists += [key] if is_plain else []
        elif event == "start_map":
            kind = _kind_by_object(key, events)
        else:
            plain.append(key)
        if kind == "columns" and plain:
            kind = "objects"
        if kind:
            return kind
        if key not in seen and len(seen) < _NUM_KEYS:
            seen.append(key)
    if "data" in seen or not seen or not (plain or lists):
        return "squad"
    return "objects" if plain else "columns"


def _kind_by_list(key: str, events: Events, *, has_columns: bool) -> tuple[DocumentKind | None, bool]:
    """Judge by the first items of the list just opened -> (the kind, if clear, whether they are texts or numbers).

    One item is not enough: the first row of a file may be a bad one.
    """
    event, _ = next(events)
    if event == "end_array":
        return ("squad" if key == "data" else None), False
    is_plain = not event.startswith("start_")
    for _ in range(_FIRST_ITEMS):
        if event == "start_map":
            names, is_whole = _first_keys(events)
            if key == "data" and "paragraphs" in names:
                return "squad", False
            if known_name(key) in _LISTS_OF_OBJECTS:
                return "objects", False
            if are_known(names):
                return "wrapped", False
            _skip_open(events, 0 if is_whole else 1)
        elif event == "start_array":
            if key == "data" and has_columns:
                return "split", False
            if known_name(key) in KNOWN_NAMES:
                return "columns", False
            _skip_open(events, 1)
        event, _ = next(events)
        if event == "end_array":
            return None, is_plain
    _skip_open(events, 2 if event.startswith("start_") else 1)
    return None, is_plain


def _kind_by_object(key: str, events: Events) -> DocumentKind | None:
    """Judge by the object just opened -> the kind, if clear."""
    names, is_whole = _first_keys(events)
    if known_name(key) == "answers" and "text" in names:
        return "objects"
    if known_name(key) in KNOWN_NAMES and names:
        return "columns"
    if are_known(names):
        return "index"
    _skip_open(events, 0 if is_whole else 1)
    return None


def _first_keys(events: Events) -> tuple[list[str], bool]:
    """-> (the first keys of the object just opened, whether these are all)."""
    names: list[str] = []
    for name in keys(events):
        names.append(name)
        if len(names) == _NUM_KEYS or name == "paragraphs":
            event, _ = next(events)
            skip_value(event, events)
            return names, False
        event, _ = next(events)
        skip_value(event, events)
    return names, True


def _skip_open(events: Events, depth: int) -> None:
    """Read to the end of `depth` open lists or objects."""
    while depth:
        event, _ = next(events)
        depth += event.startswith("start_") - event.startswith("end_")


def _wrapped(path: Path) -> Rows:
    events = json_stream.read_events(path)
    next(events)
    rows_key, number = "", 0
    for key in keys(events):
        event, _ = next(events)
        if event != "start_array":
            skip_value(event, events)
            continue
        before: list[Any] = []  # items before the first one that identifies the list of rows
        for item_event, item_value in json_stream.items(events):
            values = row_of(path, item_event, item_value, events)
            if not rows_key and isinstance(values, dict) and are_known(values):
                rows_key = key
                for number, earlier in enumerate(before, start=1):
                    yield f"row {number}", earlier
            if not rows_key and len(before) < _FIRST_ITEMS:
                before.append(values)
            if rows_key not in ("", key) and isinstance(values, dict) and are_known(values):
                raise DataError(
                    f'{path}: several lists of rows, "{short(rows_key)}" and "{short(key)}". Write each list to a separate file.'
                )
            if rows_key == key:
                number += 1
                yield f"row {number}", values
    for _ in events:  # read on: text after the document is an error
        pass


def _split(path: Path) -> Rows:
    events = json_stream.read_events(path)
    next(events)
    names: list[str] = []
    for key in keys(events):
        event, value = next(events)
        if key == "columns":
            given = build(path, event, value, events)
            names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
            if not names or len(set(names)) < len(given):
                raise DataError(f'{path}: "columns": expected distinct names. {RECORDS}')
        elif key == "data" and event == "start_array":
            for number, (item_event, item_value) in enumerate(json_stream.items(events), start=1):
                cells = _cell(path, item_event, item_value, events)
                fits = isinstance(cells, list) and len(cells) == len(names)
                yield (
                    f"row {number}",
                    dict(zip(names, cells, strict=True)) if fits else f"expected {len(names)} values",
                )
        else:
            skip_value(event, events)
    for _ in events:
        pass


def _index(path: Path) -> Rows:
    events = json_stream.read_events(path)
    next(events)
    for number, _ in enumerate(keys(events), start=1):
        event, value = next(events)
        yield f"row {number}", row_of(path, event, value, events)
    for _ in events:
        pass


def _objects(path: Path) -> Rows:
    events = json_stream.read_events(path, several=True)
    for number, (event, value) in enumerate(events, start=1):
        yield f"row {number}", row_of(path, event, value, events)


def _by_columns(path: Path) -> Rows:
    names = _column_names(path)
    with ExitStack() as stack:
        columns = [stack.enter_context(closing(_column(path, position))) for position in range(len(names))]  # type: ignore[type-var]
        for number, cells in enumerate(zip_longest(*columns), start=1):
            labels = {None if cell is None else cell[0] for cell in cells}
            if len(labels) > 1:
                missing = ", ".join(f'"{short(name)}"' for name, cell in zip(names, cells, strict=True) if cell is None)
                reason = f"{missing} has fewer values" if missing else "the columns have different row numbers"
                raise DataError(f"{path}: row {number}: {reason}, so the rows cannot be matched. {RECORDS}")
            yield f"row {number}", {name: value for name, (_, value) in zip(names, cells, strict=True)}


def _cell(path: Path, event: str, value: Any, events: Events) -> Any:
    try:
        return build(path, event, value, events, unique_keys=True)
    except RepeatedKey as error:
        raise DataError(f"{path}: {error}") from error


def _column_names(path: Path) -> list[str]:
    events = json_stream.read_events(path)
    next(events)
    names: list[str] = []
    for name in keys(events):
        event, _ = next(events)
        if event not in ("start_map", "start_array"):
            raise DataError(f'{path}: "{short(name)}": expected a column like the others. {RECORDS}')
        if name in names:
            raise DataError(f'{path}: the column "{short(name)}" is given twice. {EXPECTED}')
        names.append(name)
        if len(names) > _COLUMNS_AT_ONCE:
            raise DataError(f"{path}: more than {_COLUMNS_AT_ONCE} columns in a file by columns; write rows. {RECORDS}")
        skip_value(event, events)
    for _ in events:
        pass
    return names


def _column(path: Path, position: int) -> Iterator[tuple[str, Any]]:
    """Yield (label, value) for every cell of the column at this position in the file."""
    events = json_stream.read_events(path)
    next(events)
    for number, _ in enumerate(keys(events)):
        event, _ = next(events)
        if number < position:
            skip_value(event, events)
            continue
        if event == "start_map":
            for label in keys(events):
                event, value = next(events)
                yield label, _cell(path, event, value, events)
        else:
            for place, (event, value) in enumerate(json_stream.items(events)):
                yield str(place), _cell(path, event, value, events)
        return
