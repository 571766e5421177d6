"""The output rules: text for people goes to stderr; stdout carries one JSON document or a page.

Text from data and models is untrusted: a passage may hold terminal escapes (which can move the cursor, set the window's title or, on
some terminals, type for the user) or square brackets that rich reads as markup. So everything on the screen passes through `safe_text`,
and our console ignores markup.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

SCHEMA_VERSION = 1
WIDTH_OF_A_LOG = 120
SMALLEST_SCREEN = 10  # columns or lines; a smaller value is a mistake

# Whole escape sequences first (ECMA-48): CSI, then the strings OSC, DCS, SOS, PM and APC with their terminator, then the short ones.
# A string ends where another begins: otherwise a megabyte of beginnings would take hours, each scanned to the end.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x90\x98\x9b-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# Then the rest of C0 (tab and newline stay), DEL, C1, and the marks that reverse the writing direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def safe_text(text: object, *, one_line: bool = False) -> str:
    """`text` without terminal escapes, control characters and lone surrogates; with `one_line`, newlines become spaces."""
    clean = str(text).replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    clean = _CONTROLS.sub("", _ESCAPES.sub("", clean))
    return " ".join(clean.split()) if one_line else clean


@lru_cache(maxsize=1)
def console() -> Console:
    """The one console of the program: stderr, no markup, no emoji codes, no automatic highlighting."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    width = _size_of("COLUMNS") or (None if is_terminal else WIDTH_OF_A_LOG)
    return Console(
        stderr=True,
        markup=False,
        highlight=False,
        emoji=False,
        width=width,
        height=_size_of("LINES"),
        _environ=_without_sizes(),
    )


def _without_sizes() -> dict[str, str]:
    """The environment without COLUMNS and LINES: with COLUMNS=0, rich would print nothing."""
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}


def _size_of(variable: str) -> int | None:
    """A screen size from the environment; None where it is missing or impossible."""
    text = os.environ.get(variable, "").strip()
    size = int(text) if re.fullmatch("[0-9]{1,5}", text) else 0
    return size if size >= SMALLEST_SCREEN else None


def say(text: object, *, style: str = "") -> None:
    """Print a line for people."""
    console().print(
        Text(safe_text(text), style=style), soft_wrap=True
    )  # the terminal wraps, so copied lines stay whole


def say_warning(text: object) -> None:
    """Print a warning: something was skipped, or differs from the request."""
    say(f"warning: {text}", style="yellow")


def say_error(text: object) -> None:
    """Print the message of an error."""
    say(text, style="bold red")


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on one line of stdout, `schema_version` first; NaN and infinities become null."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **plain(document)}, allow_nan=False))
    sys.stdout.flush()


def print_markdown(text: str) -> None:
    """Print a page on stdout: laid out on a terminal, as Markdown elsewhere."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.markdown import Markdown  # its import takes longer than most verbs without torch

    screen = Console(width=_size_of("COLUMNS"), height=_size_of("LINES"), _environ=_without_sizes())
    screen.print(Markdown(safe_text(text), hyperlinks=False))


def plain(value: Any) -> Any:
    """Convert to JSON's types: dataclasses and mappings -> dict, sequences -> list, paths -> str, NaN -> None.

    Raises TypeError for any other type, so that no `repr` gets into a document.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch number
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form")
