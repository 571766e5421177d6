"""What the recipe format can say but this version does not carry out: refused by name, never ignored.

One row per refusal; the issue that builds the thing deletes its row (and nothing else here).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NotYet:
    """`refuses(value)` is true for the values of `key` that are still missing; `instead` says what to write."""

    key: str
    refuses: Callable[[Any], bool]
    instead: str
    why: str = "is not in this version"


def _is_none_of(*carried_out: Any) -> Callable[[Any], bool]:
    return lambda value: value not in carried_out


NOT_YET: tuple[NotYet, ...] = (NotYet("model.attention", _is_none_of("auto", "sdpa"), "use auto or sdpa"),)


def refusal(key: str, value: Any) -> str | None:
    """The rest of the sentence "method: "lora" ..." for a value that is not carried out; None for one that is."""
    for row in NOT_YET:
        if row.key == key and row.refuses(value):
            return f"{row.why}; {row.instead}"
    return None
