"""Over hundreds of steps nothing piles up: at equal shapes the allocator holds as many bytes after each, to the byte."""

import gc

import pytest
import torch
from torch.profiler import record_function

from qlora_lite.memory.measuring import allocator_events
from qlora_lite.model.policy import PLAIN, Policy
from qlora_lite.training.footprint import Footprint
from tests.tiny_model import random_rows
from tests.training.test_loop import fresh_state, sampler_of, steps_of

NUM_STEPS, WARM_UP = 305, 5  # the first steps make the optimizer's state, and one of them is measured
WINDOW = 50  # steps whose events are kept at the same time
STEP_IS_OVER = "step is over"


POLICIES = [PLAIN, Policy(24, "host_fewest", 0, embeddings="host", head="streamed", keys_values="host")]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_hundreds_of_steps_hold_as_many_bytes_after_each_as_after_the_first(policy: Policy) -> None:
    rows, state = random_rows([4] * 8, prompt=(12, 12)), fresh_state()
    state.footprint = Footprint(48, 0 if policy.is_plain else 1, policy=policy)
    del state.model.get_base_model().model.layers[1:]  # every layer would hold on to as much
    steps = steps_of(state, rows, sampler_of(rows, epochs=NUM_STEPS), schedule="constant")
    for _ in range(WARM_UP):
        next(steps)
    held, num_events, after_steps = 0, 0, []
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    while len(after_steps) < NUM_STEPS - WARM_UP:
        with allocator_events() as events:
            for _ in range(WINDOW):
                next(steps)
                with record_function(STEP_IS_OVER):
                    pass
        for event in events:
            if isinstance(event, int):
                held, num_events = held + event, num_events + 1
            elif event == STEP_IS_OVER:
                after_steps.append(held)
    gc.enable()
    assert len(after_steps) == NUM_STEPS - WARM_UP and num_events > 100 * len(after_steps)
    assert set(after_steps) == {after_steps[0]}
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
