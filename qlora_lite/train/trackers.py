"""Dashboards that follow a run: TensorBoard, Weights & Biases and trackio, by accelerate's tracker classes. Files only.

    in    StepStats, one a step        out    RUN_DIR/trackers/{tensorboard,wandb,trackio}/

Nothing leaves this machine: W&B runs offline and reports no errors home, and what could send trackio's rows elsewhere is
taken out of the environment. Their packages are imported only when a run asks for them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from qlora_lite.errors import UserError
from qlora_lite.train.loop import StepStats

_PROJECT = "qlora_lite"
_OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off"}
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # where trackio would send rows instead of keeping them


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise UserError when the package of one of `names` (which are the packages' own) is not installed."""
    missing = [name for name in dict.fromkeys(names) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.trackers: {', '.join(missing)} cannot be used, because the package is not installed. "
            f"Install it with: pip install {' '.join(missing)}, or leave it out of train.trackers"
        )


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, *, run_name: str, first_step: int, settings: Mapping[str, Any], device: str
) -> Iterator[Callable[[StepStats], None]]:
    """Inside, a function that logs a step to each of `names`; files go below `folder`, `settings` are shown with the run.

    Their packages must be there (`refuse_missing_trackers`). `first_step` is the first step that will be logged: those that
    an interrupted run logged after its checkpoint give way in TensorBoard and are there twice in trackio, which continues
    its run; W&B, which cannot continue offline, starts another of the same name.
    """
    trackers = [
        _make(name, folder, run_name=run_name, first_step=first_step, settings=settings)
        for name in dict.fromkeys(names)
    ]
    if trackers:
        folder.mkdir(parents=True, exist_ok=True)
        PartialState(cpu=device == "cpu")  # accelerate's logging asks for it; the loop's Accelerator finds the same one
    with ExitStack() as opened:
        for tracker in trackers:
            with redirect_stdout(sys.stderr):  # trackio prints; stdout is for --json
                tracker.start()
            opened.callback(_finish, tracker)
        yield lambda stats: _log(trackers, stats)


def tracked_values(stats: StepStats) -> dict[str, float]:
    """What trackers are told of a step; `eval_loss` only where it was measured."""
    values = {
        "loss": stats.loss,
        "learning_rate": stats.learning_rate,
        "grad_norm": stats.grad_norm,
        "tokens_per_s": stats.num_tokens / stats.step_s,
    }
    return values if stats.eval_loss is None else values | {"eval_loss": stats.eval_loss}


def _log(trackers: Sequence[GeneralTracker], stats: StepStats) -> None:
    for tracker in trackers:
        tracker.log(tracked_values(stats), step=stats.step)


def _finish(tracker: GeneralTracker) -> None:
    with redirect_stdout(sys.stderr):
        tracker.finish()


def _make(name: str, folder: Path, *, run_name: str, first_step: int, settings: Mapping[str, Any]) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", folder, purge_step=first_step)
    if name == "wandb":
        os.environ.update(_OFFLINE)
        return WandBTracker(_PROJECT, dir=str(folder), mode="offline", name=run_name, config=dict(settings))
    assert name == "trackio"
    os.environ["TRACKIO_DIR"] = str(folder.resolve() / "trackio")  # read once, when trackio is imported
    for variable in _ELSEWHERE:
        os.environ.pop(variable, None)
    return TrackioTracker(_PROJECT, name=run_name, resume="allow", embed=False, config=dict(settings))
