"""Train: a loaded model and tokenized examples -> `StepStats`, one per optimizer step, and a `TrainState` that can be saved.

loop.py        the generator of steps                        step.py        one step: forward, backward, clip, AdamW
preflight.py   try the largest micro-batch first; retry with leaner settings when memory runs out
optimizer.py   AdamW that keeps small updates                schedule.py    the learning rate of a step
state.py       all changing state of a run                   checkpoint.py  checkpoints on disk
best.py        the lowest validation loss                    footprint.py   memory settings of a step
trackers.py    dashboards                                    trace.py       a timeline of two steps
seeds.py       one seed for each purpose
"""

from qlora_lite.memory.measuring import allocator_statistics
from qlora_lite.training.checkpoint import best_valid, newest_valid, save_checkpoint
from qlora_lite.training.footprint import Footprint, apply_footprint
from qlora_lite.training.loop import StepStats, TrainSettings, train_steps
from qlora_lite.training.optimizer import make_optimizer, state_bytes
from qlora_lite.training.preflight import Preflight, try_largest_batch
from qlora_lite.training.state import TrainState
from qlora_lite.training.trace import Trace
from qlora_lite.training.trackers import open_trackers, refuse_missing_trackers

__all__ = [
    "Footprint",
    "Preflight",
    "StepStats",
    "Trace",
    "TrainSettings",
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
