"""Stream JSON: a file's events, and values built from them, so that one row at a time is in memory.

In: a path. Out: (event, value) pairs as ijson gives them, and plain values. Whatever a file holds, reading it is one clear DataError or
ends well: no recursion, and limits on depth, on the values of a row and on the bytes of one value.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson  # type: ignore[import-untyped]

from qlora_lite.data.files import EXPECTED, open_text, refuse_other_encodings
from qlora_lite.data.rows import short
from qlora_lite.errors import DataError
from qlora_lite.files.json_text import RepeatedKey
from qlora_lite.limits import JSON_DEPTH, ROW_BYTES, ROW_VALUES

KINDS = {"start_array": "a list", "start_map": "an object", "string": "text", "number": "a number", "null": "null"}

_KEPT_BYTES = 32  # of a block, to see what begins in it and ends in the next: \ud83d\udc2a, or a large number
_LARGE_NUMBER = re.compile(rb"[0-9]{19}")  # in texts too: then reading is slower, and right
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)

Events = Iterator[tuple[str, Any]]


def read_events(path: Path, *, several: bool = False) -> Events:
    """The events of a JSON file, with `several` of all the documents in it, one behind the other.

    Raises DataError for a file that cannot be read or is not JSON.
    """
    try:
        with open_text(path) as text:
            watched = _Watched(path, text.stream)
            parser = ijson.get_backend("python") if _needs_slow_parser(path) else ijson
            for event in parser.basic_parse(watched, use_float=True, multiple_values=several):
                watched.num_bytes = 0
                yield event
    except (ijson.JSONError, ValueError, OverflowError, RecursionError) as error:
        raise not_json(path, _first_lines(error)) from error


def _needs_slow_parser(path: Path) -> bool:
    """Whether something is in the file that the fast parser gets wrong.

    For half of a surrogate pair, such as \\ud83d alone, it puts a question mark; a number beyond 64 bits it takes for an error.
    """
    rest = b""
    with open_text(path) as text:
        while block := text.stream.read(2**20):
            rest += block
            if _LARGE_NUMBER.search(rest):
                return True
            end = 0
            if b"\\" in rest:
                for found in _ESCAPE.finditer(rest):
                    if found.start() > len(rest) - _KEPT_BYTES:
                        break
                    if found.lastgroup:
                        return True
                    end = found.end()
            rest = rest[max(end, len(rest) - _KEPT_BYTES) :]
    return any(found.lastgroup for found in _ESCAPE.finditer(rest))


class _Watched:
    """A file that refuses to be read on where ROW_BYTES have brought no event: one endless text or number would fill the memory."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.num_bytes = 0  # since the last event

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.num_bytes += len(block)
        if self.num_bytes > ROW_BYTES + 2**20:  # the parser reads ahead
            raise DataError(f"{self._path}: a single value of more than {ROW_BYTES:,} bytes. {EXPECTED}")
        return block


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


def skip_value(event: str, events: Events) -> None:
    """Read on to the end of the value that begins with this event."""
    depth = int(event.startswith("start_"))
    while depth:
        event, _ = next(events)
        depth += event.startswith("start_") - event.startswith("end_")


def build(path: Path, event: str, value: Any, events: Events, *, unique_keys: bool = False) -> Any:
    """The value that begins with this event. A loop, not a recursion, and at most JSON_DEPTH levels deep and ROW_VALUES large.

    Raises DataError beyond these limits, and with `unique_keys` RepeatedKey where an object has a key twice, with all of the value read.
    """
    repeated = ""
    root: list[Any] = []
    open_containers: list[Any] = [root]
    open_keys: list[str] = [""]  # per open container, the key that the next value gets
    num_values = 0
    while True:
        if event == "map_key":
            open_keys[-1] = value
        elif event in ("end_map", "end_array"):
            open_containers.pop()
            open_keys.pop()
        else:
            num_values += 1
            if num_values > ROW_VALUES:
                raise DataError(f"{path}: more than {ROW_VALUES:,} values in one row. {EXPECTED}")
            item = {} if event == "start_map" else [] if event == "start_array" else value
            holder = open_containers[-1]
            if isinstance(holder, dict):
                repeated = repeated or (open_keys[-1] if open_keys[-1] in holder else "")
                holder[open_keys[-1]] = item
            else:
                holder.append(item)
            if event in ("start_map", "start_array"):
                open_containers.append(item)
                open_keys.append("")
                if len(open_containers) > JSON_DEPTH:
                    raise DataError(f"{path}: nested more than {JSON_DEPTH} levels deep. {EXPECTED}")
        if len(open_containers) == 1 and repeated and unique_keys:
            raise RepeatedKey(repeated)
        if len(open_containers) == 1:
            return root[0]
        event, value = next(events)


def not_json(path: Path, reason: str) -> DataError:
    """The error for a file that is not JSON, with a guess at what it is."""
    with open_text(path) as text:
        start = text.stream.read(4096).lstrip().lower()
    try:
        refuse_other_encodings(path)
    except DataError as error:
        return DataError(f"{path}: not JSON: {str(error).removeprefix(f'{path}: ')}")
    is_page = start.startswith((b"<!doctype html", b"<html"))
    looks = " It looks like a web page; download the raw file." if is_page else ""
    return DataError(f"{path}: not JSON: {reason}.{looks} {EXPECTED}")


def _first_lines(error: BaseException) -> str:
    """What the parser said and the text around the place, without its drawing of an arrow."""
    said = error.args[0] if error.args else error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    lines = [short(line.strip(), 200) for line in text.splitlines() if line.strip() and "(right here)" not in line]
    message = lines[0].rstrip(".") if lines else "cannot be parsed"
    near = f", near {short(lines[1])!r}" if len(lines) > 1 else ""
    return message + near
