"""Bars of memory: one per row, of numbered parts, all to one scale, with the budget as a line across them or as a row below.

Positions are in percent, so a bar is as wide as the page and its text stays readable on a phone. The style sheet colours each part by
its class ("part-3" for the third of rows.PARTS); a part that is wide enough shows its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.show.lenient import number, numbers
from qlora_lite.show.page import html
from qlora_lite.show.rows import PARTS, in_order, size

REST = "part-rest"  # the class of the remainder: the whole less its parts
_TOP, _PITCH, _NAME, _HEIGHT = 24, 58, 14, 26  # pixels: the budget's label, a row, its name, its bar
_ROOM_FOR_A_NUMBER = 3.5  # percent of the width
FARTHEST_BUDGET = 4.0  # times the longest bar: beyond that, the bars would be too short to read


@dataclass(frozen=True)
class Bar:
    """A name, the bytes of each part, and their whole; the remainder is drawn without a colour."""

    name: str
    parts: Mapping[str, Any]
    whole_bytes: float | None

    @property
    def segments(self) -> list[tuple[str, float]]:
        """(class, bytes) from left to right."""
        sizes = numbers(self.parts)
        known = [(part_class(key), sizes[key]) for key in in_order(sizes, PARTS) if sizes[key] > 0]
        rest = self.length - sum(size for _, size in known)
        return [*known, (REST, rest)] if rest > 0 else known

    @property
    def length(self) -> float:
        return max(number(self.whole_bytes) or 0.0, sum(max(size, 0) for size in numbers(self.parts).values()))


def part_number(key: str) -> int:
    """The position of a part in rows.PARTS, counted from 1; 0 for an unknown part."""
    return 1 + list(PARTS).index(key) if key in PARTS else 0


def part_class(key: str) -> str:
    return f"part-{part_number(key)}"


def svg_bars(bars: Sequence[Bar], *, budget_bytes: float | None = None) -> str:
    """The bars, one below the other; "" when there is nothing to draw. A budget far beyond them gets its own row."""
    bars = [bar for bar in bars if bar.length > 0]
    if not bars:
        return ""
    longest, budget = max(bars, key=lambda bar: bar.length), max(budget_bytes or 0.0, 0.0)
    is_near = 0 < budget <= FARTHEST_BUDGET * longest.length
    scale = 100 / (1.02 * max(longest.length, budget if is_near else 0))
    top = _TOP if is_near else 0
    pieces = [_bar(bar, top=top + index * _PITCH, scale=scale) for index, bar in enumerate(bars)]
    height = top + len(bars) * _PITCH
    if is_near:
        pieces.append(_line(budget, x=budget * scale, height=height))
    elif budget:
        pieces.append(_gauge(longest, budget, top=height))
        height += _PITCH
    label = ". ".join(f"{bar.name}: {size(bar.length)}" for bar in bars) + (
        f". Budget: {size(budget)}" if budget else ""
    )
    return f'<svg class="bars" height="{height}" role="img" aria-label="{html(label)}">{"".join(pieces)}</svg>'


def _bar(bar: Bar, *, top: int, scale: float) -> str:
    """The name and the whole, with the parts below."""
    pieces = [
        f'<text class="name" x="0" y="{top + _NAME}">{html(bar.name)}</text>',
        f'<text class="whole" x="100%" y="{top + _NAME}" text-anchor="end">{size(bar.length)}</text>',
    ]
    x, y = 0.0, top + _NAME + 6
    for kind, num_bytes in bar.segments:
        width = num_bytes * scale
        pieces.append(f'<rect class="{kind}" x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{_HEIGHT}"/>')
        if width >= _ROOM_FOR_A_NUMBER and kind != REST:
            middle = x + width / 2
            pieces.append(f'<text class="in {kind}" x="{middle:.2f}%" y="{y + 18}">{kind.removeprefix("part-")}</text>')
        x += width
    return "".join(pieces)


def _line(budget: float, *, x: float, height: int) -> str:
    """The budget across all bars, its label on the side that has room."""
    anchor = "end" if x > 50 else "start"
    return (
        f'<text class="budget" x="{x:.2f}%" y="13" text-anchor="{anchor}">budget {size(budget)}</text>'
        f'<line class="budget" x1="{x:.2f}%" x2="{x:.2f}%" y1="18" y2="{height - 6}"/>'
    )


def _gauge(longest: Bar, budget: float, *, top: int) -> str:
    """A gauge as wide as the budget, filled to the length of the longest bar."""
    share, y = 100 * longest.length / budget, top + _NAME + 6
    return (
        f'<text class="name" x="0" y="{top + _NAME}">{html(longest.name)}: {share:.2g}% of the budget</text>'
        f'<text class="budget" x="100%" y="{top + _NAME}" text-anchor="end">{size(budget)}</text>'
        f'<rect class="gauge" x="0" y="{y}" width="100%" height="12"/>'
        f'<rect class="filled" x="0" y="{y}" width="{share:.2f}%" height="12"/>'
        f'<line class="budget" x1="99.8%" x2="99.8%" y1="{y - 3}" y2="{y + 15}"/>'
    )
