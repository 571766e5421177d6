"""JSON that somebody else wrote -> plain values. Whatever it holds, the end is a value or a ValueError.

`json.loads` raises RecursionError for deep nesting, and what it lets pass (900 levels) overflows what handles the value later.
Of bytes it guesses an encoding: a line of a UTF-16 file is decoded from any offset, which makes other characters of it. Here bytes are
UTF-8.
"""

import json
from typing import Any

from qlora_lite.files.text_file import decode_utf8
from qlora_lite.limits import JSON_DEPTH


class RepeatedKey(ValueError):
    """An object has a key twice, and JSON does not say which of the two values counts."""

    def __init__(self, key: str) -> None:
        super().__init__(f'the key "{key[:60]}" is given twice in one object; keep one of the two')


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """The value of a JSON text, at most JSON_DEPTH levels deep; a byte order mark before it is left out.

    Raises ValueError, also for bytes that are not UTF-8, and with `unique_keys` for an object that has a key twice (RepeatedKey).
    """
    text = (decode_utf8(text) if isinstance(text, bytes) else text).removeprefix("\ufeff")
    try:
        value = json.loads(text, object_pairs_hook=_object if unique_keys else None)
    except RecursionError as error:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep") from error
    if text.count("[") + text.count("{") > JSON_DEPTH and _is_deep(value):
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
