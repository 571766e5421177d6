"""What dashboards are told. Small fakes stand for the packages; one test takes the real TensorBoard where it is installed."""

import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qlora_lite import load_model, load_recipe, make_plan, train
from qlora_lite.errors import UserError
from qlora_lite.recipe.schema import TrainSection
from qlora_lite.run_dir import RunDir
from qlora_lite.train.loop import StepStats
from qlora_lite.train.trackers import open_trackers, refuse_missing_trackers, tracked_values
from tests.tiny_run import run_cli, train_cli, write_recipe

# A package of the right name that remembers what it was asked; trackio's prints as the real one's does.
FAKE_RUN = """
import os
calls = []
class Run:
    def log(self, values, step=None):
        calls.append(("log", step, values))
    def finish(self):
        print("finished")
        calls.append(("finish",))
def init(**settings):
    print("started")
    calls.append(("init", settings, dict(os.environ)))
    return Run()
"""


ELSEWHERE = {
    "WANDB_MODE": "online",
    "WANDB_ERROR_REPORTING": "true",
    "WANDB_CONSOLE": "wrap",
    "TRACKIO_DIR": "/nowhere",
    "TRACKIO_SPACE_ID": "me/space",
    "TRACKIO_SERVER_URL": "https://example.invalid",
}


class FakeWriter:
    def __init__(self, folder: str, **settings: Any) -> None:
        self.calls = sys.modules["torch.utils.tensorboard"].calls  # type: ignore[attr-defined]
        self.calls.append(("init", folder, settings))

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.calls.append(("log", global_step, {name: value}))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def fakes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three packages as fakes, in an environment that would send rows elsewhere; both are put back afterwards."""
    folder = tmp_path_factory.mktemp("fakes")
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE_RUN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (folder / "tensorboard.py").write_text("")
    writer: Any = ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter, writer.calls = FakeWriter, []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    monkeypatch.setattr(torch.utils, "tensorboard", writer, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    for variable, value in ELSEWHERE.items():
        monkeypatch.setenv(variable, value)
    return folder


def calls(name: str) -> list[Any]:
    return sys.modules["torch.utils.tensorboard" if name == "tensorboard" else name].calls  # type: ignore[attr-defined]


def step_stats(step: int, eval_loss: float | None = None) -> StepStats:
    return StepStats(step, 9, 0.5, 2.0, 1e-3, 0.25, 4, 600, 40, 1, 2.0, 2**30, None, eval_loss)


def track(names: tuple[str, ...], folder: Path, *stats: StepStats) -> None:
    opened = open_trackers(
        names, folder, run_name="run-1", first_step=stats[0].step, settings={"lora": {"r": 16}}, device="cpu"
    )
    with opened as log:
        for one in stats:
            log(one)


def test_loss_rates_speed_and_validation_are_what_is_tracked() -> None:
    expected = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.25, "tokens_per_s": 300.0}
    assert tracked_values(step_stats(1)) == expected
    assert tracked_values(step_stats(2, 1.5)) == {**expected, "eval_loss": 1.5}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_step_and_are_finished(name: str, fakes: Path, tmp_path: Path) -> None:
    track((name,), tmp_path / "trackers", step_stats(3), step_stats(4, 1.5))
    (_, settings, _), *rest = calls(name)
    assert settings["project"] == "qlora_lite" and settings["name"] == "run-1"
    assert settings["config"] == {"lora": {"r": 16}}
    logged = [("log", 3, tracked_values(step_stats(3))), ("log", 4, tracked_values(step_stats(4, 1.5)))]
    assert rest == [*logged, ("finish",)]


def test_tensorboard_gets_every_step_and_forgets_what_a_resumed_run_logs_again(fakes: Path, tmp_path: Path) -> None:
    track(("tensorboard",), tmp_path, step_stats(3, 1.5))
    first, *rest = calls("tensorboard")
    assert first == ("init", str(tmp_path / "tensorboard"), {"purge_step": 3})
    assert rest == [*(("log", 3, {k: v}) for k, v in tracked_values(step_stats(3, 1.5)).items()), ("finish",)]


def test_wandb_is_offline_and_trackio_local_whatever_the_environment_says(fakes: Path, tmp_path: Path) -> None:
    track(("wandb", "trackio"), tmp_path, step_stats(1))
    _, settings, environment = calls("wandb")[0]
    assert settings["mode"] == environment["WANDB_MODE"] == "offline" and settings["dir"] == str(tmp_path)
    assert environment["WANDB_ERROR_REPORTING"] == "false"
    _, settings, environment = calls("trackio")[0]
    assert environment["TRACKIO_DIR"] == str(tmp_path / "trackio") and settings["resume"] == "allow"
    assert not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & environment.keys()


def test_trackers_are_finished_when_training_fails_and_a_name_given_twice_is_one(fakes: Path, tmp_path: Path) -> None:
    opened = open_trackers(("wandb", "wandb"), tmp_path, run_name="run", first_step=1, settings={}, device="cpu")
    with pytest.raises(ZeroDivisionError), opened:
        raise ZeroDivisionError
    assert [call[0] for call in calls("wandb")] == ["init", "finish"]


def test_a_run_with_trackers_logs_each_step_and_keeps_stdout_for_json(fakes: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trackers=["tensorboard", "wandb", "trackio"], eval_every_steps=2, max_steps=2)
    done = train_cli(recipe, tmp_path / "run", "--json")
    assert done.json["num_steps"] == 2 and "started" in done.stderr
    for name in ("wandb", "trackio"):
        logged = [call[1:] for call in calls(name) if call[0] == "log"]
        assert [step for step, _ in logged] == [1, 2]
        assert [values.get("eval_loss") for _, values in logged] == [None, done.json["eval_loss"]["last"]]
    assert calls("wandb")[0][1]["dir"] == str(tmp_path / "run" / "trackers")
    assert calls("trackio")[0][1]["name"] == "run"


def test_a_resumed_run_goes_on_after_the_last_step_that_counts(fakes: Path, tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path, trackers=["tensorboard"], save_every_steps=2)))
    run = RunDir(tmp_path / "run")
    steps = train(plan, load_model(plan), run.path)
    for _ in range(3):
        next(steps)
    steps.close()  # as if killed: the checkpoint is step 2's
    list(train(plan, load_model(plan), run.path, resume=True))
    made = [call[2] for call in calls("tensorboard") if call[0] == "init"]
    assert made == [{"purge_step": 1}, {"purge_step": 3}]


def test_no_tracker_is_the_default_and_makes_no_folder(tmp_path: Path) -> None:
    assert TrainSection().trackers == ()
    track((), tmp_path / "trackers", step_stats(1))
    assert not (tmp_path / "trackers").exists()


def test_a_missing_package_is_told_before_anything_is_done(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python takes for not installed
    with pytest.raises(UserError, match=r"wandb cannot be used.*pip install wandb, or leave it out") as caught:
        refuse_missing_trackers(("tensorboard", "wandb", "wandb"))
    assert caught.value.exit_code == 2 and "tensorboard" not in str(caught.value)
    done = train_cli(write_recipe(tmp_path / "recipe", trackers=["wandb"]), tmp_path / "run")
    assert done.code == 2 and "planning" not in done.stderr and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = run_cli("train", write_recipe(tmp_path), "--set", "train.trackers=[tensorbord]")
    assert done.code == 2
    assert 'train.trackers: expected a list of "tensorboard" or "wandb" or "trackio", got ["tensorbord"]' in done.stderr


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the tensorboard package")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_tensorboard_reads_back_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    track(("tensorboard",), tmp_path, step_stats(1), step_stats(2, 1.5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(2, 1.5)]
