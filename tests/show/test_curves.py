"""Curves: points land where arithmetic says, whatever the values are."""

import re

import pytest

from qlora_lite.show.curves import LEFT, RIGHT, WIDTH, Line, running_mean, sampled, svg_curve


def places(svg):
    """-> the points of each polyline."""
    return [
        [tuple(float(part) for part in pair.split(",")) for pair in points.split()]
        for points in re.findall(r'points="([^"]*)"', svg)
    ]


def test_all_lines_share_one_scale_from_the_first_step_to_the_last():
    svg = svg_curve([Line([(1, 0.0), (11, 10.0)], "each"), Line([(6, 5.0)], "eval", has_dots=True)], label="loss")
    (start, end), (middle,) = places(svg)
    assert start[0] == LEFT and end[0] == WIDTH - RIGHT
    assert middle == pytest.approx(((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), abs=0.1)
    assert start[1] > end[1]  # larger values are higher up
    assert svg.count("<circle") == 1


@pytest.mark.parametrize("points", [[], [(3, 1.0)]])
def test_less_than_two_steps_are_no_curve(points):
    assert svg_curve([Line(points, "mean")], label="loss") == ""


@pytest.mark.parametrize("value", [0.0, 2e-4, -1e-12, 1e30])
def test_a_value_that_never_changes_is_a_level_line(value):
    (line,) = places(svg_curve([Line([(1, value), (2, value)], "mean")], label="rate"))
    assert line[0][1] == line[1][1]


def test_the_running_mean_is_over_the_last_few_values():
    assert running_mean([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)], 2) == [(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0)]


def test_a_sample_is_evenly_spread_and_keeps_both_ends():
    points = [(step, 1.0) for step in range(1, 102)]
    assert [step for step, _ in sampled(points, 5)] == [1, 26, 51, 76, 101]
    assert sampled(points[:3], 5) == points[:3]
