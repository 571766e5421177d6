"""Memory over one step as inline SVG: a column for each layer, in the order in which the layers end, phase after phase.

in    entries {"phase", "layer", "bytes"} of memory.json's `timeline`        out    <svg ...>, or "" for fewer than two entries
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qlora_lite.show.curves import BOTTOM, LEFT, RIGHT, TOP, WIDTH, ticks
from qlora_lite.show.lenient import is_number
from qlora_lite.show.page import html
from qlora_lite.show.rows import PHASES, Row, size

_HEIGHT = 260
_TICK_UNITS = (2**10, 2**20, 2**30, 2**40)


def svg_timeline(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw columns from zero up, with the names of the phases below."""
    entries = [entry for entry in entries if is_number(entry.get("bytes")) and entry["bytes"] >= 0]
    top = max((entry["bytes"] for entry in entries), default=0)
    if len(entries) < 2 or not top:
        return ""
    width, floor = (WIDTH - LEFT - RIGHT) / len(entries), _HEIGHT - BOTTOM
    height = (floor - TOP) / (1.05 * top)
    pieces = _scale(top, height=height, floor=floor)
    for index, entry in enumerate(entries):
        tall, kind = entry["bytes"] * height, _phase_class(entry)
        pieces.append(
            f'<rect class="{kind}" x="{LEFT + index * width:.1f}" y="{floor - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>'
        )
    label = f"memory over one step, by layer: {_in_words(entries)}"
    names = _names(entries, width=width)
    return f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{html(label)}">{"".join(pieces)}{names}</svg>'


def layer_rows(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Row]]:
    """-> (phases, for each layer the memory held at its end in each phase), both in order of appearance."""
    entries = [entry for entry in entries if is_number(entry.get("bytes"))]
    held = {(_layer(entry), _phase(entry)): entry["bytes"] for entry in entries}
    phases, layers = (list(dict.fromkeys(pair[side] for pair in held)) for side in (1, 0))
    return phases, [(layer, *(size(held.get((layer, phase))) for phase in phases)) for layer in layers]


def _phase(entry: Mapping[str, Any]) -> str:
    return str(entry.get("phase", "–"))


def _phase_class(entry: Mapping[str, Any]) -> str:
    """The style class of a phase; known phases have their own colour."""
    return f"phase-{_phase(entry)}" if _phase(entry) in PHASES else "phase"


def _layer(entry: Mapping[str, Any]) -> str:
    """`"3"` -> `layer 3`; names stay, and an entry without a layer is "all"."""
    layer = str(entry.get("layer") or "all")
    return f"layer {layer}" if layer.isdigit() else layer


def _scale(top: float, *, height: float, floor: float) -> list[str]:
    """Grid lines at round sizes, with labels."""
    unit = max((unit for unit in _TICK_UNITS if unit <= top), default=1)
    pieces = []
    for tick in ticks(0, 1.05 * top / unit):
        y = floor - tick * unit * height
        pieces.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        pieces.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{size(tick * unit)}</text>')
    return pieces


def _names(entries: Sequence[Mapping[str, Any]], *, width: float) -> str:
    """The name of each phase below the middle of its columns, kept within the drawing."""
    names, begin = [], 0
    for phase, group in groupby(entries, key=_phase):
        count = len(list(group))
        x = LEFT + (begin + count / 2) * width
        anchor = "end" if x > WIDTH - 40 else "middle"
        at = WIDTH - RIGHT if anchor == "end" else x
        names.append(f'<text x="{at:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{html(phase)}</text>')
        begin += count
    return "".join(names)


def _in_words(entries: Sequence[Mapping[str, Any]]) -> str:
    phases = groupby(entries, key=_phase)
    return ", ".join(f"{phase} up to {size(max(entry['bytes'] for entry in group))}" for phase, group in phases)
