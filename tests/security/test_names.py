"""Run folders may be called anything that the file system allows, and every command that is printed can be pasted as it stands."""

import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from qlora_lite import show
from qlora_lite.base.artefact import quantize_base
from qlora_lite.commands.train import train
from qlora_lite.errors import Interrupted
from qlora_lite.training import StepStats
from tests.tiny_model import tiny_source
from tests.tiny_run import run_cli, write_recipe

LONGEST = 255  # bytes of a name on the usual file systems
NAMES = {
    "blanks": " two  words ",
    "letters": "Ünï-é-e\u0301-東京-🦙",
    "shell": "$(touch owned) `touch owned`; 'q' \"d\" \\ & | > x !",
    "newline": "two\nlines",
    "format": "%s{0}{title}~",
    "longest": "long-" * 51,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("a recipe's folder"), max_steps=3)


@pytest.fixture(autouse=True)
def shared_home(own_home: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all of them, so that the base is quantized once."""
    monkeypatch.setenv("QLORA_LITE_HOME", str(tmp_path_factory.getbasetemp() / "names home"))


def stopped_on_the_way(recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said when SIGTERM comes in the first steps."""
    update = show.TrainScreen.update
    with monkeypatch.context() as patch:

        def stop(self: show.TrainScreen, stats: StepStats) -> None:
            update(self, stats)
            if stats.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(show.TrainScreen, "update", stop)
        with pytest.raises(Interrupted) as caught:
            train(str(recipe), [], run_dir=run, resume=False)
    return show.safe_text(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, id=kind) for kind, name in NAMES.items()), pytest.param("-rf", id="dash")]
)
def test_a_run_of_any_name_is_stopped_continued_merged_and_reported_by_the_printed_commands(
    name, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert len(os.fsencode(name)) <= LONGEST
    message = stopped_on_the_way(recipe, Path(name), monkeypatch)
    resumed = run_cli(*shlex.split(message.partition("Continue with:\n")[2])[1:])
    assert resumed.code == 0, resumed.stderr
    merged = run_cli(*shlex.split(resumed.stderr.rpartition("Next: ")[2])[1:])
    assert merged.code == 0, merged.stderr
    assert run_cli("report", "--", name).code == 0
    assert sorted(os.listdir()) == [name]
    assert {"adapter", "merged", "report.html", "train.json"} <= set(os.listdir(name))
    finished = run_cli("train", recipe, "--run-dir", name, "--resume")
    assert finished.code == 2 and "there is nothing to resume" in finished.stderr


@pytest.mark.parametrize("verb", ["train", "merge", "report", "eval"])
def test_a_name_that_no_file_system_takes_is_one_message_and_exit_code_2(verb, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x" * (LONGEST + 1)
    done = run_cli("train", recipe, "--run-dir", name) if verb == "train" else run_cli(verb, name)
    assert done.code == 2, done.stderr
    assert "Traceback" not in done.stderr and name in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m" * LONGEST, "é" * (LONGEST // 2), "-m", "two\nlines", "a:b*c?"], ids=range(5))
def test_a_model_folder_of_any_name_is_quantized_into_the_cache(name, tmp_path):
    model = Path(shutil.copytree(tiny_source(), tmp_path / name))
    folder = quantize_base(model, cache=tmp_path / "cache")
    assert quantize_base(model, cache=tmp_path / "cache") == folder
    assert os.listdir(tmp_path / "cache" / "quantized") == [folder.name]
    assert folder.name.startswith(name[:50])
