"""Over hundreds of steps nothing piles up: at equal shapes the allocator holds as many bytes after each, to the byte."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.tiny_model import random_rows
from tests.training.test_loop import fresh_state, sampler_of, steps_of

NUM_STEPS, WARM_UP = 500, 5  # the first steps make the optimizer's state, and one of them is measured


@pytest.mark.slow
def test_five_hundred_steps_hold_as_many_bytes_after_each_as_after_the_first() -> None:
    rows, state = random_rows([4] * 8, prompt=(12, 12)), fresh_state()
    steps = steps_of(state, rows, sampler_of(rows, epochs=NUM_STEPS), schedule="constant")
    for _ in range(WARM_UP):
        next(steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(NUM_STEPS - WARM_UP):
            next(steps)
            with record_function("step is over"):
                pass
    held, after_steps = 0, []
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() in ("[memory]", "step is over")]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
        else:
            after_steps.append(held)
    assert len(after_steps) == NUM_STEPS - WARM_UP and len(events) > 100 * len(after_steps)
    assert set(after_steps) == {after_steps[0]}
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
