"""Bars of memory are to scale, whatever is known of their parts."""

import re

import pytest

from qlora_lite.show.bars import FARTHEST_BUDGET, Bar, svg_bars

PARTS = {"weights_bytes": 60, "optimizer_bytes": 30, "logits_bytes": 10}


def rects(svg):
    """-> (class, x, width) of each, in percent."""
    found = re.findall(r'<rect class="([\w-]+)" x="([\d.]+)%?" y="\d+" width="([\d.]+)%"', svg)
    return [(kind, float(x), float(width)) for kind, x, width in found]


def test_parts_follow_one_another_to_one_scale_in_their_usual_order():
    parts = rects(
        svg_bars([Bar("ours", dict(reversed(PARTS.items())), 100), Bar("theirs", {"weights_bytes": 200}, 200)])
    )
    assert [kind for kind, _, _ in parts] == ["part-1", "part-5", "part-8", "part-1"]
    (_, x1, w1), (_, x2, w2), (_, x3, w3), (_, x4, w4) = parts
    assert (x1, x4) == (0, 0) and x2 == pytest.approx(w1, abs=0.02) and x3 == pytest.approx(w1 + w2, abs=0.02)
    assert w1 / w2 == pytest.approx(2, rel=1e-3) and w4 == pytest.approx(2 * (w1 + w2 + w3), abs=0.05)


def test_what_the_parts_leave_of_the_whole_is_drawn_too():
    *_, (kind, _, width) = rects(svg_bars([Bar("measured", PARTS | {"runtime_bytes": None}, 125)]))
    assert kind == "part-rest" and width == pytest.approx(100 / 1.02 / 5, abs=0.01)


def test_parts_that_exceed_their_whole_are_all_drawn():
    assert sum(width for _, _, width in rects(svg_bars([Bar("measured", PARTS, 50)]))) == pytest.approx(98.04, abs=0.05)


def test_a_near_budget_is_a_line_across_the_bars():
    svg = svg_bars([Bar("ours", PARTS, 100)], budget_bytes=200)
    assert 'x1="98.04%"' in svg and "budget 200 B" in svg and "gauge" not in svg


def test_a_far_budget_has_a_row_of_its_own_filled_by_the_longest_bar():
    budget = int(100 * FARTHEST_BUDGET) + 100
    svg = svg_bars([Bar("ours", PARTS, 100), Bar("small", {"weights_bytes": 5}, 5)], budget_bytes=budget)
    assert rects(svg)[-2:] == [("gauge", 0, 100), ("filled", 0, 20)]
    assert "ours: 20% of the budget" in svg


def test_a_screen_reader_hears_every_bar_and_the_budget():
    svg = svg_bars([Bar("ours", PARTS, 100), Bar("<b>", {}, 30)], budget_bytes=200)
    assert 'aria-label="ours: 100 B. &lt;b&gt;: 30 B. Budget: 200 B"' in svg and "<b>" not in svg


@pytest.mark.parametrize("bars", [[], [Bar("nothing", {}, None)], [Bar("nothing", {"weights_bytes": 0}, 0)]])
def test_nothing_is_not_drawn(bars):
    assert svg_bars(bars, budget_bytes=100) == ""
