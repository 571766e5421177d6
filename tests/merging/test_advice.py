"""Which rank to take, from a curve of trained ranks."""

import pytest

from qlora_lite.merging.advice import TrainedRank, advice_of_curve


def line(r: int, exact_match: float | None, loss: float = 1.0) -> TrainedRank:
    return TrainedRank(r, planned_peak_bytes=r * 2**20, num_examples=100, loss=loss, exact_match=exact_match)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(1, 20), (4, 56), (16, 60)], ("take r=4: its exact match (56.0)", "4.9 points, 100", "60.0 at r=16", "r=1 reached 20.0")),
        ([(1, 58), (4, 60), (16, 60)], ("take r=1: its exact match (58.0)", "60.0 at r=4", "1 MiB planned")),
        ([(2, 10), (8, 60)], ("take r=8", "the largest rank tried")),
        ([(1, 0), (8, 0)], ("take r=1", "within one standard error (0.5 points")),
    ],
)  # fmt: skip
def test_the_smallest_rank_within_a_standard_error_of_the_best_is_advised(curve, expected):
    advice = advice_of_curve([line(r, score) for r, score in curve])
    assert all(words in advice for words in expected), advice
    if "r=1 reached" not in "".join(expected):
        assert "r=1 reached" not in advice


def test_without_answers_the_loss_decides():
    advice = advice_of_curve([line(1, None, 1.5), line(4, None, 1.01), line(16, None, 1.0)])
    assert advice.startswith("take r=4: its loss (1.010) is within 2% of the lowest, 1.000 at r=16")
    assert advice.endswith("r=1 reached 1.500")
