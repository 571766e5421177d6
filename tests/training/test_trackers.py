"""What dashboards are told: by small fakes of the three packages, and by each real package where it is installed.

The real ones are read back by their own readers. For W&B, whose offline file has no reader in Python any more, the records are cut
out of LevelDB's log format here and parsed by the package's own protocol.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from qlora_lite import load_model, load_recipe, make_plan, train
from qlora_lite.errors import UserError
from qlora_lite.recipe.schema import TrainSection
from qlora_lite.runs.folder import RunDir
from qlora_lite.training.loop import StepStats
from qlora_lite.training.trackers import flat_settings, open_trackers, refuse_missing_trackers, tracked_values
from tests.conftest import REPOSITORY
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
def finish():
    Run().finish()
"""


ELSEWHERE = {
    "WANDB_MODE": "online",
    "WANDB_ERROR_REPORTING": "true",
    "WANDB_CONSOLE": "wrap",
    "TRACKIO_DIR": "/nowhere",
    "TRACKIO_SPACE_ID": "me/space",
    "TRACKIO_SERVER_URL": "https://example.invalid",
}

SETTINGS = {
    "method": "qlora",
    "lora": {"r": 16, "init_from": None, "modules_to_save": []},
    "data": {"train": "a_b|*c*.json"},
}


class FakeWriter:
    def __init__(self, folder: str, **settings: Any) -> None:
        self.calls = sys.modules["torch.utils.tensorboard"].calls  # type: ignore[attr-defined]
        self.calls.append(("init", folder, settings))

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.calls.append(("log", global_step, {name: value}))

    def add_text(self, name: str, text: str, global_step: int) -> None:
        self.calls.append(("text", global_step, name, text))

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
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that the fake is taken out again afterwards
        del sys.modules[name]
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
    opened = open_trackers(names, folder, run_name="run-1", first_step=stats[0].step, settings=SETTINGS)
    with opened as log:
        for one in stats:
            log(one)


def test_loss_rates_speed_and_validation_are_what_is_tracked() -> None:
    expected = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.25, "tokens_per_s": 300.0}
    assert tracked_values(step_stats(1)) == expected
    assert tracked_values(step_stats(2, 1.5)) == {**expected, "eval_loss": 1.5}


def test_settings_are_one_table_whatever_is_nested() -> None:
    assert flat_settings(SETTINGS) == {
        "method": "qlora",
        "lora.r": 16,
        "lora.init_from": None,
        "lora.modules_to_save": [],
        "data.train": "a_b|*c*.json",
    }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_step_and_are_finished(name: str, fakes: Path, tmp_path: Path) -> None:
    track((name,), tmp_path / "trackers", step_stats(3), step_stats(4, 1.5))
    (_, settings, _), *rest = calls(name)
    assert settings["project"] == "qlora_lite" and settings["name"] == "run-1"
    assert settings["config"] == SETTINGS
    logged = [("log", 3, tracked_values(step_stats(3))), ("log", 4, tracked_values(step_stats(4, 1.5)))]
    assert rest == [*logged, ("finish",)]


def test_tensorboard_gets_every_step_and_forgets_what_a_resumed_run_logs_again(fakes: Path, tmp_path: Path) -> None:
    track(("tensorboard",), tmp_path, step_stats(3, 1.5))
    first, text, *rest = calls("tensorboard")
    assert first == ("init", str(tmp_path / "tensorboard"), {"purge_step": 3})
    assert text[:3] == ("text", 3, "settings") and "    lora.r: 16\n" in text[3]
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
    opened = open_trackers(("wandb", "wandb"), tmp_path, run_name="run", first_step=1, settings={})
    with pytest.raises(ZeroDivisionError), opened:
        raise ZeroDivisionError
    assert [call[0] for call in calls("wandb")] == ["init", "finish"]


def test_a_run_with_trackers_logs_each_step_and_keeps_stdout_for_json(fakes: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trackers=["tensorboard", "wandb", "trackio"], eval_every_steps=2, max_steps=2)
    done = train_cli(recipe, tmp_path / "run", "--json")
    assert done.json["num_steps"] == 2
    assert "started" not in done.stderr  # what a tracker prints is not ours to show: names in it may hold escapes
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
    with pytest.raises(UserError, match=r"wandb cannot be used.*pip install wandb, or remove it") as caught:
        refuse_missing_trackers(("tensorboard", "wandb", "wandb"))
    assert caught.value.exit_code == 2 and "tensorboard" not in str(caught.value)
    done = train_cli(write_recipe(tmp_path / "recipe", trackers=["wandb"]), tmp_path / "run")
    assert done.code == 2 and "planning" not in done.stderr and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = run_cli("train", write_recipe(tmp_path), "--set", "train.trackers=[tensorbord]")
    assert done.code == 2
    assert 'train.trackers: expected a list of "tensorboard" or "wandb" or "trackio", got ["tensorbord"]' in done.stderr


def real(name: str) -> Any:
    """A case for the real package; skipped where it is not installed."""
    missing = pytest.mark.skipif(find_spec(name) is None, reason=f"needs the {name} package")
    return pytest.param(name, marks=missing)


EVERY_REAL = [real(name) for name in ("tensorboard", "wandb", "trackio")]
# Warnings of these packages are theirs.
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def outward(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An environment that invites connections, and the addresses beyond this machine that Python was asked to look up or reach."""
    addresses: list[object] = []

    def refuse(address: object) -> None:
        addresses.append(address)
        raise OSError(f"no connection to {address}")

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1"):
            refuse(address)
        real_connect(self, address)

    real_connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: refuse(host))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for variable, value in {**ELSEWHERE, "HF_TOKEN": "hf_token", "WANDB_API_KEY": "0" * 40}.items():
        monkeypatch.setenv(variable, value)
    return addresses


@theirs
@pytest.mark.parametrize("name", EVERY_REAL)
def test_a_real_training_is_read_back_from_the_real_tracker(name: str, outward: list[object], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trackers=[name], eval_every_steps=2, max_steps=3)
    done = train_cli(recipe, tmp_path / "run", "--json")
    assert done.json["num_steps"] == 3 and outward == []
    steps = RunDir(tmp_path / "run").read_steps()
    expected = {
        key: {s["step"]: s[key] for s in steps if s[key] is not None} for key in ("loss", "grad_norm", "eval_loss")
    }
    assert sorted(expected["eval_loss"]) == [2, 3]
    series, settings = READ_BACK[name](tmp_path / "run" / "trackers")
    for key, values in expected.items():
        assert series[key] == pytest.approx(values, rel=1e-6), key
    assert settings["lora.r"] == 16 and settings["train.early_stop"] is None and settings["train.trackers"] == [name]


@theirs
@pytest.mark.parametrize("name", EVERY_REAL)
def test_a_second_run_in_the_same_process_writes_below_its_own_folder(
    name: str, outward: list[object], tmp_path: Path
) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        track((name,), folder, step_stats(1), step_stats(2, 1.5))
    for folder in (tmp_path / "first", tmp_path / "second"):
        series, settings = READ_BACK[name](folder)
        assert series["loss"] == {1: 2.0, 2: 2.0} and series["eval_loss"] == {2: 1.5}
        assert settings == flat_settings(SETTINGS)
    assert outward == []


@theirs
@pytest.mark.parametrize("name", [real("tensorboard"), real("trackio")])
def test_what_a_resumed_run_logs_again_counts(name: str, outward: list[object], tmp_path: Path) -> None:
    track((name,), tmp_path, step_stats(1), step_stats(2), step_stats(3, 1.0))
    track((name,), tmp_path, step_stats(2), step_stats(3, 1.5))
    series, settings = READ_BACK[name](tmp_path)
    assert series["loss"] == dict.fromkeys((1, 2, 3), 2.0) and series["eval_loss"] == {3: 1.5}
    assert settings == flat_settings(SETTINGS)


ALONE = """
import sys
from pathlib import Path
from tests.training.test_trackers import step_stats, track
track((sys.argv[1],), Path(sys.argv[2]), step_stats(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_REAL)
def test_a_real_tracker_prints_nothing_on_stdout_even_when_the_process_ends(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, name, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def read_tensorboard(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """(name -> step -> value, the flat settings) by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    series = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    text = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    lines = [line.removeprefix("    ").partition(": ") for line in text.splitlines()]
    return series, {key: json.loads(value) for key, _, value in lines}


def read_wandb(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """The same of the one offline run. W&B's own process writes it, which may end after the run does."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, f"{path}: no end of the run in {len(records)} records"
        time.sleep(0.1)
        records = [Record.FromString(data) for data in _log_records(path.read_bytes())]
    series: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}
    for record in records:
        values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for key in values.keys() & {"loss", "grad_norm", "eval_loss"}:
            series.setdefault(key, {})[int(values["_step"])] = float(values[key])
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key != "_wandb"}
    return series, flat_settings(settings)


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind W&B's 7 bytes (github.com/google/leveldb, doc/log_format.md).

    Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: a whole record, 2 to 4: its first, a middle and its last
    piece), data. What is left of a block below 7 bytes is not used.
    """
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        end = position + 7 + int.from_bytes(data[position + 4 : position + 6], "little")
        if end > len(data):  # is being written
            return
        record += data[position + 7 : end]
        if data[position + 6] in (1, 4):
            yield record
            record = b""
        position = end


def read_trackio(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """The same of the newest run, by trackio's own storage, which knows the folder that it was imported with."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[module]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str((folder / "trackio").resolve()))
        from trackio.sqlite_storage import SQLiteStorage
    (name,) = SQLiteStorage.get_runs("qlora_lite")
    series: dict[str, dict[int, float]] = {}
    for row in SQLiteStorage.get_logs("qlora_lite", name):
        for key in row.keys() & {"loss", "grad_norm", "eval_loss"}:
            series.setdefault(key, {})[row["step"]] = row[key]
    config = SQLiteStorage.get_run_config("qlora_lite", name)
    assert config is not None and config["_Username"] is None
    return series, flat_settings({key: value for key, value in config.items() if not key.startswith("_")})


READ_BACK = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
