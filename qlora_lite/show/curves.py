"""Curves of a run as inline SVG: steps from left to right, one or more lines on one scale.

    in    points (step, value), finite, in the order of their steps        out    <svg ...>, or "" where there is no line to draw

The page's style sheet colours each line by its class: "each", "mean", "eval".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 92, 14, 12, 32  # pixels of the view box


@dataclass(frozen=True)
class Line:
    """One line of a curve; `kind` is its class in the style sheet, `has_dots` marks each of a few points."""

    points: Points
    kind: str
    has_dots: bool = False


def svg_curve(lines: Sequence[Line], *, label: str, height: int = 260) -> str:
    """Draw the lines on a common scale; "" for fewer than two steps. `label` must be escaped already."""
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    if len(set(xs)) < 2:
        return ""
    left, right = min(xs), max(xs)
    pad = (max(ys) - min(ys)) * 0.05 or abs(max(ys)) * 0.05 or 0.5
    low, high = min(ys) - pad, max(ys) + pad

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left),
            TOP + (height - BOTTOM - TOP) * (high - y) / (high - low),
        )

    parts = []
    for tick in ticks(low, high):
        y = at(left, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (tick for tick in ticks(left, right) if tick == int(tick)):
        parts.append(f'<text x="{at(tick, low)[0]:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for line in lines:
        places = [at(*point) for point in line.points]
        parts.append(f'<polyline class="{line.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if line.has_dots:
            parts += [f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places]
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def running_mean(points: Points, window: int) -> list[tuple[float, float]]:
    """Replace each value by the mean of itself and up to `window - 1` values before it."""
    values = [value for _, value in points]
    windows = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [(step, sum(recent) / len(recent)) for (step, _), recent in zip(points, windows, strict=True)]


def sampled(points: Points, num: int) -> list[tuple[float, float]]:
    """At most `num` of the points, evenly spread, including the first and the last."""
    if len(points) <= num:
        return list(points)
    return [points[round(index * (len(points) - 1) / (num - 1))] for index in range(num)]


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between `low` and `high`."""
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    spacing = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough)
    first = math.ceil(low / spacing)
    return [round(index * spacing, 10) for index in range(first, math.floor(high / spacing) + 1)]
