"""JSON from other programs -> plain values, or a ValueError for any invalid content.

`json.loads` raises RecursionError for deep nesting, and the 900 levels it accepts overflow later code. It guesses the encoding of
bytes: a line of a UTF-16 file would be decoded from any offset, into wrong characters. Here bytes are UTF-8.
"""

import json
from typing import Any

from qlora_lite.files.text_file import decode_utf8
from qlora_lite.limits import JSON_DEPTH


class RepeatedKey(ValueError):
    """A key given twice in one object; JSON does not define which value counts."""

    def __init__(self, key: str) -> None:
        super().__init__(f'the key "{key[:60]}" is given twice in one object; keep one of them')


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Parse JSON text of at most JSON_DEPTH levels, with or without a byte order mark.

    Raises ValueError, also for bytes that are not UTF-8, and with `unique_keys` RepeatedKey for a key given twice in one object.
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
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
