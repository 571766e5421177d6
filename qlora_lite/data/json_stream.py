"""Stream JSON: a file's events, and values built from them, so that one row at a time is in memory.

In: a path. Out: (event, value) pairs as ijson gives them, and plain values. Whatever a file holds, reading it is one clear DataError or
ends well: no recursion, a limit on depth.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson  # type: ignore[import-untyped]

from qlora_lite.data.files import EXPECTED, open_data_file
from qlora_lite.data.rows import short
from qlora_lite.errors import DataError

MAX_DEPTH = 64  # SQuAD nests 8 deep, a tool's JSON schema rarely more than 10
KINDS = {"start_array": "a list", "start_map": "an object", "string": "text", "number": "a number", "null": "null"}

Events = Iterator[tuple[str, Any]]


def read_events(path: Path) -> Events:
    """The events of a JSON file. Raises DataError for a file that cannot be read or is no JSON."""
    try:
        with open_data_file(path) as file:
            start = file.read(3)
            file.seek(3 if start == b"\xef\xbb\xbf" else 0)  # a byte order mark is no JSON, but editors write it
            yield from ijson.basic_parse(file, use_float=True)
    except (ijson.JSONError, RecursionError, UnicodeError) as error:
        raise not_json(path, _first_lines(error)) from error


def keys(events: Events) -> Iterator[str]:
    """The keys of the object that was just opened; the caller reads each key's value before it asks for the next."""
    for event, value in events:
        if event == "end_map":
            return
        assert event == "map_key", event
        yield value


def items(events: Events) -> Events:
    """The first event of each item of the list that was just opened; the caller reads the rest of it."""
    for event, value in events:
        if event == "end_array":
            return
        yield event, value


def build(path: Path, event: str, value: Any, events: Events) -> Any:
    """The value that begins with this event. A loop, not a recursion, and at most MAX_DEPTH levels deep."""
    root: list[Any] = []
    open_containers: list[Any] = [root]
    open_keys: list[str] = [""]  # per open container, the key that the next value gets
    while True:
        if event == "map_key":
            open_keys[-1] = value
        elif event in ("end_map", "end_array"):
            open_containers.pop()
            open_keys.pop()
        else:
            item = {} if event == "start_map" else [] if event == "start_array" else value
            holder = open_containers[-1]
            if isinstance(holder, dict):
                holder[open_keys[-1]] = item
            else:
                holder.append(item)
            if event in ("start_map", "start_array"):
                open_containers.append(item)
                open_keys.append("")
                if len(open_containers) > MAX_DEPTH:
                    raise DataError(f"{path}: nested more than {MAX_DEPTH} levels deep. {EXPECTED}")
        if len(open_containers) == 1:
            return root[0]
        event, value = next(events)


def not_json(path: Path, reason: str) -> DataError:
    """The error for a file that is no JSON, with a guess at what it is."""
    with open_data_file(path) as file:
        start = file.read(4096)
    guess = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
    if not guess and b"\0" in start:
        guess = "a binary file"
    looks = f" It looks like {guess}." if guess else ""
    return DataError(f"{path}: not JSON: {reason}.{looks} {EXPECTED}")


_MAGIC = {
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"ARROW1": "an Arrow file; save it as Parquet, or give the folder that `datasets` saved",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def _first_lines(error: BaseException) -> str:
    """What the parser said and the text around the place, without its drawing of an arrow."""
    said = error.args[0] if error.args else error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "(right here)" not in line]
    message = lines[0].rstrip(".") if lines else "cannot be parsed"
    near = f", near {short(lines[1])!r}" if len(lines) > 1 else ""
    return message + near
