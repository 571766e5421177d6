"""The largest micro-batch of a plan with sharing: valid for any data, and never smaller than one that training packs."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.batches import make_batches, sampler_of
from qlora_lite.data.template import Encoded
from qlora_lite.data.trees import Forest, Node, Sharing, sharing
from qlora_lite.plan.planner import _further, largest_tree
from qlora_lite.plan.rehearsal import MicroBatch, Settings, meta_batch, num_labels
from tests.random_tree import random_tree
from tests.tiny_model import Rows

COUNT = st.integers(1, 5000)


def forest_of(num_rows: int, num_tokens: int) -> Forest:
    """Rows that share nothing."""
    lengths = {row: num_tokens // num_rows + (row < num_tokens % num_rows) for row in range(num_rows)}
    return Forest(Node(0, 0, (), tuple(lengths)), lengths)


def check_valid(batch: MicroBatch) -> None:
    made = meta_batch(batch)
    assert min(made.lengths) >= 1 and sum(made.lengths) == batch.num_tokens == made.input_ids_1T.shape[1]
    assert num_labels(batch) >= 1 and made.predictor_N.shape[0] >= batch.num_examples


@settings(max_examples=300, deadline=None)
@given(COUNT, st.integers(0, 5000), COUNT, COUNT, st.lists(st.tuples(st.integers(1, 40), COUNT), max_size=3), COUNT)
def test_any_sharing_gives_a_valid_micro_batch_of_as_many_tokens_as_there_may_be(
    tokens, trunk, branch, labels, steps, longest
):
    forests = tuple(forest_of(rows, max(rows, size)) for rows, size in steps)
    found = Sharing(10**6, 10**5, trunk, branch, labels, steps=forests, longest_row=longest)
    batch = largest_tree(tokens, found)
    check_valid(batch)
    most = max((forest.num_tokens for forest in forests), default=tokens)
    assert batch.num_tokens == max(min(tokens, most), longest, 2)
    for _, _, smaller in _further(Settings(), batch):
        check_valid(smaller)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 600), st.integers(1, 3), st.integers(1, 12))
def test_training_packs_no_micro_batch_that_is_fuller_than_the_planned_one(seed, per_step, tokens, epochs, num_sampled):
    rows = random_tree(random.Random(seed), depth=2, fan=3)
    sampler = sampler_of(
        rows, examples_per_step=per_step, epochs=epochs, max_steps=None, seed=seed, share_prefixes=True
    )  # fmt: skip
    steps = [sampler.rows_of_step(step) for step in range(len(sampler))]
    found = sharing(rows, steps[:num_sampled], others=steps[num_sampled:])
    planned = largest_tree(tokens, found)
    check_valid(planned)
    for step in steps:
        for batch in make_batches(rows, step, micro_batch_tokens=tokens, share_prefixes=True):
            num_tokens = batch.input_ids_1T.shape[1]
            assert num_tokens <= planned.num_tokens
            assert num_tokens <= tokens or len(batch.rows) == 1


def test_a_step_shorter_than_its_rows_times_the_average_branch_has_a_trunk():
    """Rows of steps of one size, of which most are longer than those of the fullest step."""
    found = Sharing(900, 500, trunk=20, branch=110, num_labels=4, steps=(forest_of(5, 480),), longest_row=130)
    batch = largest_tree(2048, found)
    check_valid(batch)
    assert batch.num_tokens == 480


def test_a_shorter_length_cuts_the_trunk_too():
    """Half of 200 tokens is less than a trunk of 110: minus 10 tokens for each example."""
    batch = MicroBatch(200, 5, 0.1, trunk=110)
    lengths = [smaller.length for setting, _, smaller in _further(replace(Settings(), method="full"), batch)
               if "max_seq_length" in setting]  # fmt: skip
    assert lengths == [100]
    for length in (199, 100, 64, 2):
        check_valid(batch.shortened(length))


def test_of_steps_that_are_not_looked_at_the_sizes_count():
    rows = Rows([Encoded(list(range(length)), ((length - 1, length),)) for length in (40, 50, 60, 200)])
    found = sharing(rows, [[0, 1]], others=[[2, 3]])
    assert (found.most_tokens, found.most_rows, found.longest_row) == (260, 2, 200)
    assert largest_tree(4096, found).num_tokens == 260
    assert largest_tree(100, found).num_tokens == 200
    assert largest_tree(100, found, length=128).num_tokens == 128  # rows that are to be cut
