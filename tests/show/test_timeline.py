"""Memory over a step: a column for each layer, as tall as its bytes."""

import re

import pytest

from qlora_lite.show.timeline import layer_rows, svg_timeline

ENTRIES = [
    {"phase": "forward", "layer": "embedding", "bytes": 100},
    {"phase": "forward", "layer": "0", "bytes": 200},
    {"phase": "head", "layer": "head", "bytes": 400},
    {"phase": "backward", "layer": "0", "bytes": 300},
    {"phase": "update", "layer": "", "bytes": 0},
]


def test_columns_stand_side_by_side_as_tall_as_their_bytes():
    found = re.findall(
        r'<rect class="phase-(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', svg_timeline(ENTRIES)
    )
    assert [phase for phase, *_ in found] == ["forward", "forward", "head", "backward", "update"]
    heights = [float(height) for *_, height in found]
    assert heights == pytest.approx([heights[2] * share for share in (0.25, 0.5, 1, 0.75, 0)], abs=0.1)
    lefts, width = [float(x) for _, x, _, _ in found], float(found[0][2])
    assert lefts == pytest.approx([lefts[0] + index * width for index in range(5)], abs=0.3)


def test_phases_are_named_in_their_order_and_in_words():
    svg = svg_timeline(ENTRIES)
    assert re.findall(r'y="252"[^>]*>(\w+)<', svg) == ["forward", "head", "backward", "update"]
    assert "forward up to 200 B, head up to 400 B" in svg


def test_the_same_numbers_stand_in_a_table():
    assert layer_rows(ENTRIES) == (
        ["forward", "head", "backward", "update"],
        [
            ("embedding", "100 B", "–", "–", "–"),
            ("layer 0", "200 B", "–", "300 B", "–"),
            ("head", "–", "400 B", "–", "–"),
            ("all", "–", "–", "–", "0 B"),
        ],
    )


@pytest.mark.parametrize("entries", [[], ENTRIES[:1], ENTRIES[-1:] * 3, [{"phase": "forward"}] * 3])
def test_less_than_two_columns_are_no_drawing(entries):
    assert svg_timeline(entries) == ""


def test_names_from_the_file_are_escaped():
    assert "<b>" not in svg_timeline([{"phase": "<b>", "layer": "<b>", "bytes": size} for size in (1, 2)])
