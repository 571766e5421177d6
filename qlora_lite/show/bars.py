"""Bars of memory: one a row, made of numbered parts, all to one scale, with the budget as a line across them.

Places are given in percent, so a bar is as wide as the page and its text stays readable on a phone. Colours come from the style sheet by
the class of a part ("part-3" for the third of rows.PARTS); the number of the part stands in it wherever there is room.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.show.lenient import number, numbers
from qlora_lite.show.page import html
from qlora_lite.show.rows import PARTS, in_order, size

_TOP, _PITCH, _NAME, _HEIGHT = 24, 58, 14, 26  # pixels: the budget's words, a row, its name, its bar
_ROOM_FOR_A_NUMBER = 3.5  # percent of the width
_FARTHEST_BUDGET = 4.0  # times the longest bar: further out, the line would leave too little of the bars to see


@dataclass(frozen=True)
class Bar:
    """A name, bytes part by part, and their whole; what the parts leave of it is drawn without a colour."""

    name: str
    parts: Mapping[str, Any]
    whole_bytes: float | None

    @property
    def segments(self) -> list[tuple[str, float]]:
        """(class, bytes) from left to right."""
        sizes = numbers(self.parts)
        known = [(part_class(key), sizes[key]) for key in in_order(sizes, PARTS) if sizes[key] > 0]
        rest = self.length - sum(size for _, size in known)
        return [*known, ("part-rest", rest)] if rest > 0 else known

    @property
    def length(self) -> float:
        return max(number(self.whole_bytes) or 0.0, sum(max(size, 0) for size in numbers(self.parts).values()))


def part_number(key: str) -> int:
    """The place of a part in rows.PARTS, counted from 1; 0 for one that is not there."""
    return 1 + list(PARTS).index(key) if key in PARTS else 0


def part_class(key: str) -> str:
    return f"part-{part_number(key)}"


def svg_bars(bars: Sequence[Bar], *, budget_bytes: float | None = None) -> str:
    """The bars under each other; "" when there is nothing to draw."""
    bars = [bar for bar in bars if bar.length > 0]
    if not bars:
        return ""
    longest = max(bar.length for bar in bars)
    is_near = budget_bytes is not None and 0 < budget_bytes <= _FARTHEST_BUDGET * longest
    scale = 100 / (1.02 * max(longest, budget_bytes if is_near and budget_bytes else 0))
    drawn = [_bar(bar, top=_TOP + index * _PITCH, scale=scale) for index, bar in enumerate(bars)]
    height = _TOP + len(bars) * _PITCH
    line = _budget(budget_bytes, scale=scale, longest=longest, height=height) if budget_bytes else ""
    label = ". ".join(_in_words(bar) for bar in bars) + (f". Budget {size(budget_bytes)}" if budget_bytes else "")
    return f'<svg class="bars" height="{height}" role="img" aria-label="{html(label)}">{"".join(drawn)}{line}</svg>'


def _bar(bar: Bar, *, top: int, scale: float) -> str:
    """The name, the whole, and the parts below both."""
    pieces = [
        f'<text class="name" x="0" y="{top + _NAME}">{html(bar.name)}</text>',
        f'<text class="whole" x="100%" y="{top + _NAME}" text-anchor="end">{size(bar.length)}</text>',
    ]
    x, y = 0.0, top + _NAME + 6
    for kind, num_bytes in bar.segments:
        width = num_bytes * scale
        pieces.append(f'<rect class="{kind}" x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{_HEIGHT}"/>')
        if width >= _ROOM_FOR_A_NUMBER and kind != "part-rest":
            middle = x + width / 2
            pieces.append(f'<text class="in {kind}" x="{middle:.2f}%" y="{y + 18}">{kind.removeprefix("part-")}</text>')
        x += width
    return "".join(pieces)


def _budget(budget_bytes: float, *, scale: float, longest: float, height: int) -> str:
    """A line at the budget; where it lies far to the right of all bars, words that say how far."""
    x = budget_bytes * scale
    if x > 100:
        times = budget_bytes / longest
        words = f"budget {size(budget_bytes)}: {times:,.0f} times the longest bar →"
        return f'<text class="budget" x="100%" y="13" text-anchor="end">{words}</text>'
    anchor = "end" if x > 50 else "start"
    return (
        f'<text class="budget" x="{x:.2f}%" y="13" text-anchor="{anchor}">budget {size(budget_bytes)}</text>'
        f'<line class="budget" x1="{x:.2f}%" x2="{x:.2f}%" y1="18" y2="{height - 6}"/>'
    )


def _in_words(bar: Bar) -> str:
    return f"{bar.name}: {size(bar.length)}"
