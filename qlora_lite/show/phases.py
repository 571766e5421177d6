"""Show the current phase and, at its end, the time it took: `with phase("loading the base"): ...`.

A terminal shows a spinner; elsewhere one line opens the phase and one closes it, so a log shows both.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from qlora_lite.show.text import console, safe_text, say
from qlora_lite.units import format_seconds

LINE_EVERY_S = 10.0


@dataclass
class Phase:
    """A phase in progress. `note` adds a remark to its closing line; `elapsed_s` is set at its end."""

    name: str
    remark: str = ""
    elapsed_s: float = 0.0

    live: Any = None  # rich's status line on a terminal
    _last_line_s: float = 0.0

    def note(self, remark: str) -> None:
        self.remark = remark

    def progress(self, done: int, total: int) -> None:
        """Show `done` of `total`: in place on a terminal, a line every ten seconds elsewhere."""
        words = f"{safe_text(self.name)}: {done} of {total}"
        if self.live is not None:
            self.live.update(Text(words))  # rich reads a string as markup here, even with markup=False
        elif time.perf_counter() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.perf_counter()
            say(words)


@contextmanager
def phase(name: str, *, spent: dict[str, float] | None = None) -> Iterator[Phase]:
    """Show `name` while the block runs, then its seconds; an exception is shown as "failed after" and propagates.

    Also store the seconds in `spent[name]`.
    """
    current, begin, ending = Phase(name), time.perf_counter(), "failed after "
    live: Any = console().status(Text(safe_text(name))) if console().is_terminal else nullcontext()
    if not console().is_terminal:
        say(f"{name} ...")
    try:
        with live as current.live:
            current._last_line_s = begin
            yield current
        ending = ""
    finally:
        current.elapsed_s = time.perf_counter() - begin
        if spent is not None:
            spent[name] = current.elapsed_s
        remark = f" ({current.remark})" if current.remark else ""
        say(f"{name}: {ending}{format_seconds(current.elapsed_s)}{remark}", style="red" if ending else "green")
