"""JSON that somebody else wrote -> plain values. Whatever it holds, the end is a value or a ValueError.

`json.loads` raises RecursionError for deep nesting, and what it lets pass (900 levels) overflows what handles the value later.
"""

import json
from typing import Any

from qlora_lite.limits import JSON_DEPTH


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, at most JSON_DEPTH levels deep. Raises ValueError, also for bytes that are no UTF-8."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep") from error
    num_opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if num_opened > JSON_DEPTH and _is_deep(value):
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
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
