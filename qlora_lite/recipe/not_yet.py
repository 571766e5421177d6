"""Values that the recipe format allows but this version does not support: refused by name, never ignored.

One entry per refusal; whoever implements the feature deletes its entry (and nothing else here).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NotYet:
    """An unsupported value: `refuses(value)` is true for the values of `key` to refuse; `instead` is the advice."""

    key: str
    refuses: Callable[[Any], bool]
    instead: str
    why: str = "is not supported in this version"


def _is_none_of(*supported: Any) -> Callable[[Any], bool]:
    return lambda value: value not in supported


NOT_YET: tuple[NotYet, ...] = (NotYet("model.attention", _is_none_of("auto", "sdpa"), "use auto or sdpa"),)


def refusal(key: str, value: Any) -> str | None:
    """Return the rest of the sentence "method: "lora" ..." for an unsupported value; None for a supported one."""
    for entry in NOT_YET:
        if entry.key == key and entry.refuses(value):
            return f"{entry.why}; {entry.instead}"
    return None
