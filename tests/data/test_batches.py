"""Steps and micro-batches: every row once per epoch, positions per example, labels one to the left, few and even batches."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from qlora_lite.data.batches import StepSampler, make_batches, pack_batch
from qlora_lite.data.template import Encoded


@dataclass
class Fake:
    """Examples of given lengths; example i holds the ids 1000*i, 1000*i+1, ... and its last two tokens are labels."""

    sizes: list[int]
    lengths: np.ndarray = field(init=False)

    def __post_init__(self):
        self.lengths = np.array(self.sizes)

    def encoded(self, index):
        size = self.sizes[index]
        return Encoded(list(range(1000 * index, 1000 * index + size)), ((size - 2, size),))


def test_a_batch_packs_examples_in_one_row_and_points_at_predictors():
    batch = pack_batch([Encoded([5, 6, 7], ((1, 3),)), Encoded([8, 9, 10, 11], ((3, 4),))], rows=[4, 2])
    assert batch.input_ids_1T.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids_1T.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.predictor_N.tolist() == [0, 1, 5]
    assert batch.target_N.tolist() == [6, 7, 11]
    assert (batch.lengths, batch.rows) == ((3, 4), (4, 2))
    tensors = (batch.input_ids_1T, batch.position_ids_1T, batch.predictor_N, batch.target_N)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    moved = batch.to("meta")
    assert moved.input_ids_1T.device.type == moved.target_N.device.type == "meta"
    assert moved.rows == batch.rows


def test_several_trained_turns_of_an_example_are_all_predicted_and_nothing_else_is():
    turns = Encoded([10, 11, 12, 13, 14, 15, 16], ((1, 3), (5, 7)))
    assert (turns.predictors, turns.num_label_tokens) == ([0, 1, 4, 5], 4)
    batch = pack_batch([Encoded([5, 6, 7], ((2, 3),)), turns], rows=[0, 1])
    assert batch.predictor_N.tolist() == [1, 3, 4, 7, 8]
    assert batch.target_N.tolist() == [7, 11, 12, 15, 16]


@pytest.mark.parametrize("spans", [(), ((0, 2),), ((2, 2),), ((1, 4),), ((2, 3), (1, 2))])
def test_spans_that_are_no_labels_of_their_row_are_our_bug(spans):
    with pytest.raises(AssertionError):
        Encoded([1, 2, 3], spans)


def filled_in_order(sizes, capacity):
    """Totals of micro-batches that are filled in the order the rows come."""
    totals = [0]
    for size in sizes:
        if totals[-1] + size > capacity:
            totals.append(0)
        totals[-1] += size
    return totals


def fewest(sizes, capacity, totals=()):
    """The smallest possible number of micro-batches, by trying every split."""
    if not sizes:
        return len(totals)
    first, *rest = sizes
    places = [i for i, total in enumerate(totals) if total + first <= capacity]
    tried = [tuple(t + first * (i == place) for i, t in enumerate(totals)) for place in places]
    return min(fewest(rest, capacity, totals) for totals in [*tried, (*totals, first)])


@pytest.mark.parametrize("seed", range(20))
def test_no_split_of_a_small_step_has_fewer_micro_batches(seed):
    sizes = np.random.default_rng(seed).integers(3, 300, 7).tolist()
    assert len(make_batches(Fake(sizes), range(7), micro_batch_tokens=400)) == fewest(sizes, 400)


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_every_row_once_within_the_limit(seed):
    sizes = np.random.default_rng(seed).integers(3, 300, 16).tolist()
    examples, rows = Fake(sizes), [int(i) for i in np.random.default_rng(seed).permutation(16)]
    batches = make_batches(examples, rows, micro_batch_tokens=400)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(16))
    totals = [batch.input_ids_1T.shape[1] for batch in batches]
    assert max(totals) <= 400 and totals == sorted(totals)
    assert len(batches) <= len(filled_in_order(sizes, 400))
    for batch in batches:
        assert list(batch.rows) == sorted(batch.rows)
        assert batch.lengths == tuple(sizes[row] for row in batch.rows)
        assert sum(batch.lengths) == batch.input_ids_1T.shape[1]
        assert batch.target_N.tolist() == [1000 * row + sizes[row] - k for row in batch.rows for k in (2, 1)]
    again = make_batches(examples, rows[::-1], micro_batch_tokens=400)
    assert [batch.rows for batch in again] == [batch.rows for batch in batches], (
        "the order of a step's rows does not matter"
    )


def test_batches_are_few_and_evenly_filled():
    batches = make_batches(Fake([100] * 16), range(16), micro_batch_tokens=600)
    assert [sum(batch.lengths) for batch in batches] == [500, 500, 600]
    whole = make_batches(Fake([100] * 16), range(16), micro_batch_tokens=10_000)
    assert [batch.rows for batch in whole] == [tuple(range(16))]


def test_an_example_longer_than_the_limit_is_a_batch_of_its_own():
    batches = make_batches(Fake([50, 900, 40, 30]), [3, 2, 1, 0], micro_batch_tokens=120)
    assert [batch.rows for batch in batches] == [(0, 2, 3), (1,)]


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        make_batches(Fake([3]), [0], micro_batch_tokens=0)


def sampler(**changes):
    settings = {"examples_per_step": 4, "epochs": 2, "max_steps": None, "seed": 0}
    return StepSampler(changes.pop("num_examples", 10), **settings | changes)


def test_an_epoch_visits_every_example_once_and_its_last_step_may_be_smaller():
    steps = sampler()
    assert len(steps) == 6
    epochs = [[steps.rows_of_step(step) for step in range(3 * e, 3 * e + 3)] for e in range(2)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [4, 4, 2]
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_a_step_depends_on_seed_and_step_only():
    forward = sampler()
    in_order = [forward.rows_of_step(step) for step in range(6)]
    backward = sampler()
    assert [backward.rows_of_step(step) for step in reversed(range(6))] == in_order[::-1]
    torch.manual_seed(7)
    np.random.seed(7)
    assert sampler().rows_of_step(5) == in_order[5]
    assert sampler(seed=1).rows_of_step(0) != in_order[0]
    assert sampler(epochs=9).rows_of_step(5) == in_order[5]


def test_max_steps_wins_over_epochs():
    assert len(sampler(max_steps=2)) == 2
    assert len(sampler(max_steps=50)) == 50
    assert len(sampler(max_steps=50).rows_of_step(49)) == 4


def test_steps_outside_the_run_and_bad_settings_are_refused():
    for step in (-1, 6):
        with pytest.raises(IndexError):
            sampler().rows_of_step(step)
    for change in ({"num_examples": 0}, {"examples_per_step": 0}, {"max_steps": 0}, {"epochs": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            sampler(**change)
