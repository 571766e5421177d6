"""Shared prefixes, drawn: each example separately, and the shared passage once with its questions as branches.

In: a plan's JSON. The drawing shows an average tree, to scale; the numbers are those of the steps that the plan sampled.
"""

from collections.abc import Mapping
from typing import Any

from qlora_lite.show.bars import part_class
from qlora_lite.show.lenient import mapping, number
from qlora_lite.show.page import Html, drawing, join, paragraph, table

MOST_BRANCHES = 8  # drawn
_TRUNK, _BRANCH = part_class("weights_bytes"), part_class("optimizer_bytes")  # colours
_TOP, _HEIGHT, _PITCH = 20, 14, 20  # pixels
_GAP = 4  # percent of the width, where trunk and branches are joined


def sharing(plan: Mapping[str, Any]) -> Html:
    """The section; "" where nothing is shared."""
    counts = mapping(plan.get("sharing"))
    alone, packed, trunk, branch, rows = (
        number(counts.get(key))
        for key in ("tokens_alone", "tokens_packed", "trunk_tokens", "branch_tokens", "rows_per_trunk")
    )
    if not (alone and packed and trunk and branch and rows):
        return Html()
    words = (
        "Several examples start with the same text, such as a passage with several questions. The model reads that text once: "
        f"{packed:,.0f} tokens (pieces of words) are computed instead of {alone:,.0f}, {alone / packed:.2f} times fewer."
    )
    caption = "Left to right: the tokens of a typical group of examples, to scale. Blue is shared, violet belongs to one example."
    lines = [
        ("all sampled examples, each separately", f"{alone:,.0f}"),
        ("the same, shared text once", f"{packed:,.0f}"),
        ("shared tokens per example, on average", f"{trunk:,.0f}"),
        ("own tokens per example, on average", f"{branch:,.0f}"),
        ("examples per shared text, on average", f"{rows:.1f}"),
    ]
    return join(
        [
            paragraph(words),
            drawing(svg_tree(trunk, branch, round(rows)), caption),
            table("Tokens", ["", "number"], lines),
        ]
    )


def svg_tree(trunk: float, branch: float, num_branches: int) -> str:
    """Separate examples above, the tree below."""
    num_branches = min(max(2, num_branches), MOST_BRANCHES)
    scale = (100 - _GAP) / (trunk + branch)
    split, own = trunk * scale, branch * scale  # percent of the width
    below = _TOP + num_branches * _PITCH + 28
    tall = (num_branches - 1) * _PITCH + _HEIGHT
    middle = below + tall / 2
    pieces = [_words("each example separately", _TOP - 6), _words("the shared text once", below - 6)]
    for index in range(num_branches):
        y, branch_y = _TOP + index * _PITCH, below + index * _PITCH
        pieces += [
            _rect(_TRUNK, 0, split, y),
            _rect(_BRANCH, split, own, y),
            _rect(_BRANCH, split + _GAP, own, branch_y),
        ]
        pieces.append(
            f'<line class="stem" x1="{split:.2f}%" x2="{split + _GAP:.2f}%" y1="{middle}" y2="{branch_y + _HEIGHT / 2}"/>'
        )
    pieces.append(_rect(_TRUNK, 0, split, middle - _HEIGHT / 2))
    label = (
        f"{num_branches} examples of {trunk:.0f} shared and {branch:.0f} own tokens: the shared ones are computed once"
    )
    return f'<svg class="bars" height="{below + tall + 6}" role="img" aria-label="{label}">{"".join(pieces)}</svg>'


def _words(text: str, y: float) -> str:
    return f'<text class="name" x="0" y="{y}">{text}</text>'


def _rect(kind: str, x: float, width: float, y: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}%" y="{y}" width="{width:.2f}%" height="{_HEIGHT}"/>'
