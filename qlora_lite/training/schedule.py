"""The learning rate of a step: a pure function, so that a resumed run needs no stored state."""

import math


def learning_rate_at(step: int, *, num_steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """Return the rate of step `step` (from 0): rises linearly over ceil(warmup_ratio * num_steps) steps, then follows `schedule`.

    The rate is never 0: the first step has peak / warmup steps, and the last one is still above 0.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak
