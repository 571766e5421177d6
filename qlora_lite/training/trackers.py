"""Dashboards of a run: TensorBoard, Weights & Biases and trackio, with accelerate's tracker classes. Files only.

    in    StepStats, one per step        out    RUN_DIR/trackers/{tensorboard,wandb,trackio}/

No data leaves this machine: W&B runs offline without error reports, environment variables that make trackio send its data elsewhere are
removed, and the hub is not queried for the user's name. The packages are imported only when a run uses them.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from qlora_lite.device.accelerator import card_here
from qlora_lite.errors import UserError
from qlora_lite.training.loop import StepStats

_PROJECT = "qlora_lite"
_OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off"}
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # places where trackio would send its data


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raise UserError if one of `names` (they are also package names) is not installed."""
    missing = [name for name in dict.fromkeys(names) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.trackers: {', '.join(missing)} cannot be used: the package is not installed. "
            f"Install it with: pip install {' '.join(missing)}, or remove it from train.trackers"
        )


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, *, run_name: str, first_step: int, settings: Mapping[str, Any]
) -> Iterator[Callable[[StepStats], None]]:
    """Context manager: a function that logs a step to each of `names`; files go below `folder`, `settings` are shown with the run.

    The packages must be installed (`refuse_missing_trackers`). `first_step` is the first step to log. Steps that an interrupted run
    logged after its checkpoint are replaced in TensorBoard and appear twice in trackio, which continues its run; W&B cannot continue
    offline and starts another run of the same name.
    """
    trackers = [
        _make(name, folder, run_name=run_name, first_step=first_step, settings=settings)
        for name in dict.fromkeys(names)
    ]
    if trackers:
        folder.mkdir(parents=True, exist_ok=True)
        PartialState(cpu=card_here() is None)  # needed by accelerate's logging; shared with the loop's Accelerator
    with ExitStack() as opened:
        for tracker in trackers:
            with redirect_stdout(io.StringIO()):  # trackio prints the folder's name with its escapes
                tracker.start()
            opened.callback(_finish, tracker)
        yield lambda stats: _log(trackers, stats)


def tracked_values(stats: StepStats) -> dict[str, float]:
    """Return the logged values of a step; `eval_loss` only if it was measured."""
    values = {
        "loss": stats.loss,
        "learning_rate": stats.learning_rate,
        "grad_norm": stats.grad_norm,
        "tokens_per_s": stats.num_tokens / stats.step_s,
    }
    return values if stats.eval_loss is None else values | {"eval_loss": stats.eval_loss}


def flat_settings(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested `settings`, joining keys: {"lora": {"r": 16}} -> {"lora.r": 16}. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def _log(trackers: Sequence[GeneralTracker], stats: StepStats) -> None:
    for tracker in trackers:
        tracker.log(tracked_values(stats), step=stats.step)


def _finish(tracker: GeneralTracker) -> None:
    with redirect_stdout(io.StringIO()):
        tracker.finish()


def _make(name: str, folder: Path, *, run_name: str, first_step: int, settings: Mapping[str, Any]) -> GeneralTracker:
    if name == "tensorboard":
        return _TensorBoard(folder, settings, first_step)
    if name == "wandb":
        os.environ.update(_OFFLINE)
        return WandBTracker(_PROJECT, dir=str(folder), mode="offline", name=run_name, config=dict(settings))
    assert name == "trackio"
    return _Trackio(folder.resolve() / "trackio", settings, run_name)


class _TensorBoard(TensorBoardTracker):
    """accelerate's tracker, with the settings on TensorBoard's text page.

    accelerate's `store_init_configuration` is not used: it refuses lists, omits null values, and stores the settings in a separate run
    named by the time.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        super().__init__("tensorboard", folder, purge_step=first_step)
        self._settings, self._first_step = settings, first_step

    def start(self) -> None:
        super().start()
        lines = [
            f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in flat_settings(self._settings).items()
        ]
        # Four spaces make a Markdown code block. Logged at the first step, so that a resumed run's settings replace them.
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in lines), global_step=self._first_step)


class _Trackio(TrackioTracker):
    """accelerate's tracker, stored on this machine in `folder`, and fully ended by `finish`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run_name: str) -> None:
        super().__init__(_PROJECT, name=run_name, resume="allow", embed=False, config=dict(settings))
        self._folder = folder

    def start(self) -> None:
        os.environ["TRACKIO_DIR"] = str(self._folder)
        for variable in _ELSEWHERE:
            os.environ.pop(variable, None)
        # trackio reads its folder once, on import: a second run in this process would write into the first one's.
        for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[module]
        with _hub_offline():
            super().start()

    def finish(self) -> None:
        import trackio

        trackio.finish()  # the run's own finish(), which accelerate calls, is repeated at exit, with a line on stdout


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep trackio from querying the hub for the user's name, which it stores in every run's settings."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
