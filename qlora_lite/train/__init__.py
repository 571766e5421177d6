"""Train: a loaded model and tokenized examples -> `StepStats`, one an optimizer step, and a `TrainState` that can be saved.

loop.py   the generator        update.py    one whole optimizer step            step.py        forward, backward, one divisor
preflight.py   the largest micro-batch, tried first; what to do when memory runs out      footprint.py   how a step is computed
optimizer.py   AdamW that keeps small steps
state.py  all that changes     checkpoint.py   it on disk                        best.py        the lowest validation loss
trackers.py  for dashboards    measure.py  what it takes   trace.py  a timeline            schedule.py
"""

from qlora_lite.train.checkpoint import best_valid, newest_valid, save_checkpoint
from qlora_lite.train.footprint import Footprint, apply_footprint
from qlora_lite.train.loop import StepStats, train_steps
from qlora_lite.train.measure import allocator_statistics
from qlora_lite.train.optimizer import make_optimizer, state_bytes
from qlora_lite.train.preflight import Preflight, try_largest_batch
from qlora_lite.train.state import TrainState
from qlora_lite.train.trace import Trace
from qlora_lite.train.trackers import open_trackers, refuse_missing_trackers

__all__ = [
    "Footprint",
    "Preflight",
    "StepStats",
    "Trace",
    "TrainState",
    "allocator_statistics",
    "apply_footprint",
    "best_valid",
    "make_optimizer",
    "newest_valid",
    "open_trackers",
    "refuse_missing_trackers",
    "save_checkpoint",
    "state_bytes",
    "train_steps",
    "try_largest_batch",
]
