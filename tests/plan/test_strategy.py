"""The order of strategies and the search through them, on made-up peaks; real ones: tests/promises/test_promise_07_budget.py."""

from dataclasses import replace
from itertools import pairwise

import pytest

from qlora_lite.device.card import COMMON_CARD, CPU
from qlora_lite.plan.strategy import CHECKPOINTING, Free, Strategy, choose, next_leaner, strategies
from qlora_lite.training.footprint import Footprint


def ways(free: Free = Free(), **changes) -> tuple[Strategy, ...]:  # noqa: B008  # frozen
    settings = {"card": COMMON_CARD, "method": "qlora", "length": 1000}
    return strategies(free, **settings | changes)


def made_up_peak(way: Strategy) -> int:
    """Falls with each thing that is leaner."""
    kept = {0: 9, 2: 6, 1: 2}[way.footprint.checkpoint_every]
    return 1000 + kept * way.footprint.micro_batch_tokens + way.footprint.head_chunk + 10 * (way.optimizer == "adamw")


def test_the_fastest_keeps_everything_and_nothing_is_slower_than_recomputing_all_in_small_pieces():
    found = ways()
    assert found[0].footprint == Footprint(4096, 0, 256) and found[0].optimizer == "adamw" and found[0].slowdown == 1
    assert found[-1].footprint == Footprint(1000, 1, 16) and found[-1].optimizer == "paged_adamw_8bit"
    same_chunk = [way for way in found if way.footprint.head_chunk == 256]
    assert all(a.slowdown <= b.slowdown for a, b in pairwise(same_chunk))


def test_recomputing_costs_half_where_the_base_is_frozen_and_a_third_where_it_is_trained():
    def cost(method: str) -> float:
        found = {way.footprint: way.slowdown for way in ways(Free(micro_batch_tokens=4096), method=method)}
        return found[Footprint(4096, 1)]

    assert cost("lora") == pytest.approx(3 / 2) and cost("full") == pytest.approx(4 / 3)


def test_what_a_recipe_fixes_is_not_chosen():
    fixed = Free(checkpoint_every=3, micro_batch_tokens=777, head_chunk=99, optimizer="adamw")
    assert [(way.footprint, way.optimizer) for way in ways(fixed)] == [(Footprint(777, 3, 99), "adamw")]
    assert {way.footprint.checkpoint_every for way in ways(replace(fixed, checkpoint_every=None))} == set(CHECKPOINTING)


def test_the_first_that_fits_is_chosen():
    for budget in range(2000, 50_000, 500):
        choice = choose(ways(), made_up_peak, budget_bytes=budget)
        fitting = [way for way in ways() if made_up_peak(way) <= budget]
        assert choice.fits == bool(fitting)
        assert choice.strategy == (fitting[0] if fitting else ways()[-1])


def test_recomputing_is_rather_chosen_than_cutting_trees():
    def repeated(tokens: int) -> float:
        return 1.0 if tokens >= 2000 else 2.0

    budget = 1000 + 9 * 1000 + 300  # whole layers kept at 1,000 tokens, or recomputed at 4,096
    fitting = {True: Footprint(4096, 1), False: Footprint(1000, 0)}
    for cuts_trees, footprint in fitting.items():
        found = ways(repeated=repeated) if cuts_trees else ways(Free(), card=CPU, method="lora")
        assert choose(found, made_up_peak, budget_bytes=budget).strategy.footprint == footprint


def test_not_every_way_is_rehearsed():
    assert len(choose(ways(), made_up_peak, budget_bytes=10_000).tried) < len(ways()) / 4


def test_a_run_without_memory_goes_down_to_the_leanest_and_each_step_is_leaner():
    leaner, now = next_leaner(Free(), length=700), Footprint(4096, 0)
    seen = [now]
    while (now := leaner(now)) is not None:
        seen.append(now)
    assert [(f.checkpoint_every, f.micro_batch_tokens, f.head_chunk) for f in seen] == [
        (0, 4096, 256), (2, 4096, 256), (1, 4096, 256), (1, 2048, 256), (1, 1024, 256), (1, 700, 256), (1, 700, 64), (1, 700, 16),
    ]  # fmt: skip


def test_it_does_not_touch_what_the_recipe_fixes():
    leaner = next_leaner(Free(checkpoint_every=0, micro_batch_tokens=4096, head_chunk=256), length=700)
    assert leaner(Footprint(4096, 0)) is None
