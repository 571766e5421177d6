"""The lowest validation loss of a run so far: decides which checkpoint is kept and published, and when to stop early."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest loss, in nats per label token, and how many evaluations came after it."""

    step: int
    eval_loss: float
    num_since: int = 0  # evaluations after it; none of them was lower


def best_after(best: Best | None, *, step: int, eval_loss: float) -> Best:
    """Return the best after one more evaluation; for equal losses, the earlier one."""
    if best is None or eval_loss < best.eval_loss:
        return Best(step, eval_loss)
    return replace(best, num_since=best.num_since + 1)
