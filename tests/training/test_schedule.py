"""Learning rates by arithmetic."""

import pytest

from qlora_lite.training.schedule import learning_rate_at


def rates(schedule, *, num_steps, warmup_ratio=0.0, peak=1.0):
    return [
        learning_rate_at(step, num_steps=num_steps, peak=peak, schedule=schedule, warmup_ratio=warmup_ratio)
        for step in range(num_steps)
    ]


def test_each_schedule_has_the_values_of_its_formula():
    assert rates("constant", num_steps=3, peak=2e-4) == [2e-4] * 3
    assert rates("linear", num_steps=4) == [1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", num_steps=4) == pytest.approx([1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])


def test_warmup_rises_in_a_line_to_the_peak_over_a_rounded_up_number_of_steps():
    assert rates("constant", num_steps=10, warmup_ratio=0.31) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6
    assert rates("linear", num_steps=6, warmup_ratio=0.3) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 38])
def test_every_step_learns_and_none_more_than_the_peak(schedule, warmup_ratio, num_steps):
    values = rates(schedule, num_steps=num_steps, warmup_ratio=warmup_ratio)
    assert all(0 < value <= 1.0 for value in values) and max(values) == 1.0
