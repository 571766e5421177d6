"""Read JSON documents of any shape: a value of an unexpected shape counts as missing.

A report must not fail on a run that was stopped half-way, or whose files somebody edited.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a finite number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> float | None:
    return value if is_number(value) else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(value: Any) -> dict[str, float]:
    """The numbers of a mapping."""
    return {key: item for key, item in mapping(value).items() if is_number(item)}


def dig(document: Mapping[str, Any], *keys: str) -> Any:
    """`dig(plan, "methods", "qlora")` is `plan["methods"]["qlora"]`, or None where a key is missing."""
    value: Any = document
    for key in keys:
        value = mapping(value).get(key)
    return value
