"""Prefix trees: what is shared, what is not worth it, how a tree is split, and which rows come in one step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.batches import StepSampler, make_batches, pack_trees
from qlora_lite.data.template import Encoded
from qlora_lite.data.trees import LEAST_SHARED, Node, families, grow, sharing
from qlora_lite.model.tree_attention import parts_of
from tests.tiny_model import Rows


def rows_of(*examples: tuple[list[int], list[int]]) -> Rows:
    """From (prompt, answer) each."""
    return Rows([Encoded(prompt + answer, ((len(prompt), len(prompt) + len(answer)),)) for prompt, answer in examples])


HEADER, A, B = list(range(100, 140)), list(range(200, 230)), list(range(300, 320))


def nested() -> Rows:
    """A header over everything; two questions on passage A, one on B, one that shares the header alone, one that shares nothing."""
    return rows_of(
        (HEADER + A + [1], [7, 9]), (HEADER + A + [2], [8, 9]), (HEADER + B + [3], [9]), ([*HEADER, 4], [9]), ([5, 6], [9]),
        (HEADER + B, [9]),
    )  # fmt: skip


def test_what_is_shared_is_found_from_the_tokens():
    forest = grow(nested(), range(6))
    assert forest.top.rows == (4,)
    (header,) = forest.top.nodes
    assert (header.start, header.end, header.rows) == (0, 40, (3,))
    assert [(node.start, node.end, sorted(node.rows)) for node in header.nodes] == [(40, 70, [0, 1]), (40, 60, [2, 5])]
    assert forest.num_alone == nested().lengths.sum()
    assert forest.num_tokens == forest.num_alone - 4 * 40 - 30 - 20


def test_a_label_is_never_shared():
    """Equal rows, label and all: the prompt is shared, the answers are apart."""
    rows = rows_of((HEADER, [7, 9]), (HEADER, [7, 9]), ([*HEADER, 7], [9]))
    (node,) = grow(rows, range(3)).top.nodes
    assert (node.start, node.end, sorted(node.rows)) == (0, 40, [0, 1, 2])


def test_a_few_tokens_are_not_worth_a_branch():
    short = list(range(LEAST_SHARED - 1))
    assert grow(rows_of(([*short, 90], [9]), ([*short, 91], [9])), range(2)).top.nodes == ()
    (node,) = grow(rows_of(([*short, 80, 90], [9]), ([*short, 80, 91], [9])), range(2)).top.nodes
    assert node.end == LEAST_SHARED


def test_very_deep_trees_end_somewhere():
    run = list(range(5000))
    rows = rows_of(*(([*run[: 20 * i], 9999], [9]) for i in range(1, 200)))
    forest = grow(rows, range(199))

    def levels(node: Node) -> int:
        return 1 + max(map(levels, node.nodes), default=0)

    assert sorted(forest.top.all_rows()) == list(range(199)) and 10 < levels(forest.top) <= 34


def test_a_row_of_trees_is_packed_depth_first():
    batch = pack_trees(nested(), range(6))
    paths = row_paths(batch)
    for place, row in enumerate(batch.rows):
        assert paths[place] == nested().encoded(row).input_ids
    parts_of(batch.lengths, batch.parents)  # in order
    assert batch.input_ids_1T.shape[1] == sum(batch.lengths) == grow(nested(), range(6)).num_tokens


def row_paths(batch) -> list[list[int]]:
    """The tokens that each row's last segment and all that it continues hold; positions must count on."""
    ids, positions = batch.input_ids_1T[0].tolist(), batch.position_ids_1T[0].tolist()
    assert all([positions[i] for i in path] == list(range(len(path))) for path in batch.paths)
    return [[ids[i] for i in path] for path in batch.paths]


@st.composite
def some_rows(draw):
    rng = random.Random(draw(st.integers(0, 2**32)))
    runs = [[rng.randrange(50) for _ in range(rng.randint(10, 60))] for _ in range(4)]
    examples = []
    for _ in range(draw(st.integers(1, 24))):
        prompt = [token for run in rng.sample(runs, rng.randint(0, 3)) for token in run] + [
            rng.randrange(50) for _ in range(rng.randint(1, 9))
        ]
        examples.append((prompt, [rng.randrange(50) for _ in range(rng.randint(1, 5))]))
    return rows_of(*examples)


@settings(max_examples=60, deadline=None)
@given(rows=some_rows(), capacity=st.integers(1, 400))
def test_micro_batches_hold_every_row_once_and_no_more_than_they_may(rows, capacity):
    batches = make_batches(rows, range(len(rows)), micro_batch_tokens=capacity, share_prefixes=True)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        size = batch.input_ids_1T.shape[1]
        assert size <= capacity or len(batch.rows) == 1
        for path, row in zip(row_paths(batch), batch.rows, strict=True):
            assert path == rows.encoded(row).input_ids
        targets = [
            token
            for row in batch.rows
            for start, end in rows.encoded(row).spans
            for token in rows.encoded(row).input_ids[start:end]
        ]
        assert batch.target_N.tolist() == targets
    sizes = [batch.input_ids_1T.shape[1] for batch in batches]
    assert sizes == sorted(sizes)
    assert sum(sizes) <= rows.lengths.sum()


def test_rows_on_one_passage_are_a_family_and_a_header_over_everything_is_none():
    passages = [[1000 * p + i for i in range(50)] for p in range(6)]
    rows = rows_of(*((HEADER + passages[p] + [q], [9]) for p in range(6) for q in range(5)), ([*HEADER, 1], [9]))
    found = families(grow(rows, range(31)), examples_per_step=8)
    assert sorted(map(sorted, found)) == [*([5 * p + q for q in range(5)] for p in range(6)), [30]]


def test_rows_that_share_nothing_are_no_family_however_small_a_step_is():
    rows = rows_of(*(([q, q + 1], [9]) for q in range(6)))
    assert sorted(families(grow(rows, range(6)), examples_per_step=2)) == [[q] for q in range(6)]


def test_a_family_larger_than_a_step_stays_one_and_is_cut_at_random():
    passages = [[1000 * p + i for i in range(50)] for p in range(20)]
    rows = rows_of(*((passages[p] + [q], [9]) for p in range(20) for q in range(10)))
    found = families(grow(rows, range(200)), examples_per_step=4)
    assert sorted(map(sorted, found)) == [list(range(10 * p, 10 * p + 10)) for p in range(20)]
    sampler = StepSampler(200, examples_per_step=4, epochs=2, max_steps=None, seed=0, families=found)
    for epoch in range(2):
        steps = [sampler.rows_of_step(epoch * 50 + step) for step in range(50)]
        assert sorted(row for step in steps for row in step) == list(range(200))
        assert all(1 <= len(step) <= 7 for step in steps)
    assert sampler.rows_of_step(3) != sampler.rows_of_step(53)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), size=st.integers(1, 16), seed=st.integers(0, 99))
def test_a_step_holds_what_it_should_give_or_take_one_family(sizes, size, seed):
    numbers = iter(range(sum(sizes)))
    groups = [[next(numbers) for _ in range(count)] for count in sizes]
    sampler = StepSampler(sum(sizes), examples_per_step=size, epochs=1, max_steps=None, seed=seed, families=groups)
    steps = [sampler.rows_of_step(step) for step in range(len(sampler))]
    assert sorted(row for step in steps for row in step) == list(range(sum(sizes)))
    piece = min(size, max(sizes))
    assert all(abs(len(step) - size) < piece for step in steps[:-1]) and 0 < len(steps[-1]) < size + piece
    again = StepSampler(sum(sizes), examples_per_step=size, epochs=1, max_steps=None, seed=seed, families=groups)
    assert again.rows_of_step(len(again) - 1) == steps[-1]


def test_without_families_the_order_is_what_it_was():
    sampler = StepSampler(10, examples_per_step=4, epochs=1, max_steps=None, seed=3)
    assert not sampler.share_prefixes
    assert [len(sampler.rows_of_step(step)) for step in range(3)] == [4, 4, 2]
    with pytest.raises(IndexError):
        sampler.rows_of_step(3)


def test_what_cutting_trees_costs_is_what_micro_batches_then_hold():
    rows = rows_of(
        *(([*HEADER, *A, number, number + 1], [9]) for number in range(400, 420, 2))
    )  # ten of 73 tokens, 70 shared
    found = sharing(rows, [range(10)])
    assert (found.num_packed, found.repeated(1000), found.repeated(100)) == (70 + 10 * 3, 1.0, 1.0)
    for tokens in (99, 80, 76, 1):
        batches = make_batches(rows, range(10), micro_batch_tokens=tokens, share_prefixes=True)
        total = sum(batch.input_ids_1T.shape[1] for batch in batches)
        assert found.repeated(tokens) == total / 100 > 1
    assert found.repeated(1) == found.factor and found.rows_per_trunk == 10
