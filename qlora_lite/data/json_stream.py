"""Streamed JSON: the events of a file, and values built from them, with one row in memory at a time.

In: a path. Out: (event, value) pairs from ijson, and plain values. Raises one clear DataError for any invalid file: no recursion, and
limits on depth, on the values of a row and on the bytes of one value.
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

_KEPT_BYTES = 32  # overlap of blocks, for sequences across two blocks: \ud83d\udc2a, or a large number
_LARGE_NUMBER = re.compile(rb"[0-9]{19}")  # also matches in text: then reading is slower, and still correct
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)

_NOT_A_NUMBER = re.compile(rb"NaN|Infinity")  # also matches in text
_NEXT_TOKEN = re.compile(rb'"|NaN|-?Infinity')
_REST_OF_STRING = re.compile(rb'(?:[^"\\]|\\.)*"', re.DOTALL)

Events = Iterator[tuple[str, Any]]


def read_events(path: Path, *, several: bool = False) -> Events:
    """Yield the events of a JSON file; with `several`, of all documents in it, one after the other.

    Raises DataError for an unreadable file or one that is not JSON.
    """
    try:
        with open_text(path) as text:
            parser = ijson.get_backend("python") if _needs_slow_parser(path) else ijson
            watched = _Watched(path, _NullForNaN(text.stream) if _has_nan(path) else text.stream)
            for event in parser.basic_parse(watched, use_float=True, multiple_values=several):
                watched.num_bytes = 0
                yield event
    except (ijson.JSONError, ValueError, OverflowError, RecursionError) as error:
        raise not_json(path, _first_lines(error)) from error


def _needs_slow_parser(path: Path) -> bool:
    """Whether the file contains something that the fast parser reads wrongly.

    It replaces half of a surrogate pair, such as \\ud83d alone, by a question mark, and rejects numbers beyond 64 bits.
    """
    rest = b""
    with open_text(path) as text:
        while block := text.stream.read(2**20):
            rest += block
            if _LARGE_NUMBER.search(rest):
                return True
            end = 0
            if b"\\" in rest:
                for escape in _ESCAPE.finditer(rest):
                    if escape.start() > len(rest) - _KEPT_BYTES:
                        break
                    if escape.lastgroup:
                        return True
                    end = escape.end()
            rest = rest[max(end, len(rest) - _KEPT_BYTES) :]
    return any(escape.lastgroup for escape in _ESCAPE.finditer(rest))


def _has_nan(path: Path) -> bool:
    rest = b""
    with open_text(path) as text:
        while block := text.stream.read(2**20):
            if _NOT_A_NUMBER.search(rest + block):
                return True
            rest = block[-_KEPT_BYTES:]
    return False


class _NullForNaN:
    """A JSON file with null in place of NaN and Infinity, which Python's json writes for missing numbers; JSON has neither (RFC 8259)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest, self._in_string = file, b"", False

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        new = self._file.read(size)
        block, self._rest = self._rest + new, b""
        pieces, at = [], 0
        while at < len(block):
            match = (_REST_OF_STRING.match if self._in_string else _NEXT_TOKEN.search)(block, at)
            if match is None:
                end = len(block) if not new else self._end_of_whole(block, at)
                pieces.append(block[at:end])
                self._rest = block[end:]
                break
            is_number = match[0][-1:] != b'"'
            pieces.append(block[at : match.start()] + b"null" if is_number else block[at : match.end()])
            self._in_string ^= not is_number
            at = match.end()
        out = b"".join(pieces)
        return out if out or not new else self.read(size)

    def _end_of_whole(self, block: bytes, at: int) -> int:
        """Where the last token or escape may be incomplete; the rest waits for the next block."""
        if self._in_string:
            backslashes = len(block) - len(block.rstrip(b"\\"))
            return len(block) - backslashes % 2
        return max(at, len(block) - len(b"-Infinity"))


class _Watched:
    """A file that raises DataError after ROW_BYTES without an event: one endless text or number would fill the memory."""

    def __init__(self, path: Path, file: "BinaryIO | _NullForNaN") -> None:
        self._path, self._file = path, file
        self.num_bytes = 0  # since the last event

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.num_bytes += len(block)
        if self.num_bytes > ROW_BYTES + 2**20:  # the parser reads ahead
            raise DataError(f"{self._path}: a single value of more than {ROW_BYTES:,} bytes. {EXPECTED}")
        return block


def keys(events: Events) -> Iterator[str]:
    """Yield the keys of the object just opened; the caller reads each value before it requests the next key."""
    for event, value in events:
        if event == "end_map":
            return
        assert event == "map_key", event
        yield value


def items(events: Events) -> Events:
    """Yield the first event of each item of the list just opened; the caller reads the rest of the item."""
    for event, value in events:
        if event == "end_array":
            return
        yield event, value


def skip_value(event: str, events: Events) -> None:
    """Read to the end of the value that begins with this event."""
    depth = int(event.startswith("start_"))
    while depth:
        event, _ = next(events)
        depth += event.startswith("start_") - event.startswith("end_")


def build(path: Path, event: str, value: Any, events: Events, *, unique_keys: bool = False) -> Any:
    """Build the value that begins with this event, without recursion, within JSON_DEPTH levels and ROW_VALUES values.

    Raises DataError beyond these limits; with `unique_keys`, after reading the value, RepeatedKey for a key given twice in one object.
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
    """Return the error for a file that is not JSON, with a guess at its real kind."""
    with open_text(path) as text:
        start = text.stream.read(4096).lstrip().lower()
    try:
        refuse_other_encodings(path)
    except DataError as error:
        return DataError(f"{path}: not JSON: {str(error).removeprefix(f'{path}: ')}")
    is_page = start.startswith((b"<!doctype html", b"<html"))
    hint = " It looks like a web page; download the raw file." if is_page else ""
    return DataError(f"{path}: not JSON: {reason}.{hint} {EXPECTED}")


def _first_lines(error: BaseException) -> str:
    """Return the parser's message and the text at the error, without the drawn arrow."""
    argument = error.args[0] if error.args else error
    text = argument.decode("utf-8", "replace") if isinstance(argument, bytes) else str(argument)
    lines = [short(line.strip(), 200) for line in text.splitlines() if line.strip() and "(right here)" not in line]
    message = lines[0].rstrip(".") if lines else "cannot be parsed"
    near = f", near {short(lines[1])!r}" if len(lines) > 1 else ""
    return message + near
