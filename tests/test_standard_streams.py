"""A program whose streams, screen or home are not as usual works, or says one clear thing; it never says nothing."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite import show
from qlora_lite.commands.stopping import stop_signals
from qlora_lite.errors import UserError
from qlora_lite.files.cache import default_cache
from qlora_lite.show.text import WIDTH_OF_A_LOG, console
from qlora_lite.standard_streams import standard_streams
from tests.conftest import REPOSITORY
from tests.tiny_run import NUM_STEPS, write_recipe

PROGRAM = f"{sys.executable} -m qlora_lite"
NEEDS_DEV_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def shell(line: str, **environ: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", line.replace("qlora-lite", PROGRAM)], capture_output=True, text=True, cwd=REPOSITORY,
        env={**os.environ, **environ}, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("qlora-lite recipes list --json >&-", 2, "--json: stdout is closed"),
        ("qlora-lite recipes list <&- >&-", 0, "smollm2-135m_country-qa"),
        pytest.param("qlora-lite recipes schema >/dev/full", 2, "stdout cannot be written (No space", marks=NEEDS_DEV_FULL),
        pytest.param("qlora-lite --help >/dev/full", 2, "stdout cannot be written (No space left", marks=NEEDS_DEV_FULL),
        ("qlora-lite ask nowhere - <&-", 2, "ask: stdin is closed"),
    ],
)  # fmt: skip
def test_a_closed_or_full_stream_is_one_clear_message(line, code, said):
    found, _, stderr = shell(line)
    assert (found, "Traceback" in stderr, "Exception ignored" in stderr) == (code, False, False)
    assert said in stderr


@NEEDS_DEV_FULL
def test_training_whose_messages_cannot_be_written_goes_on_to_its_end(tmp_path):
    recipe = write_recipe(tmp_path)
    line = f"qlora-lite train {recipe} --run-dir {tmp_path / 'run'} --json --set data.eval=null 2>/dev/full"
    code, stdout, _ = shell(line)
    assert code == 0 and json.loads(stdout)["num_steps"] == NUM_STEPS
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


class Broken(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_message_that_cannot_be_written_is_dropped_and_a_result_is_not(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken())
    monkeypatch.setattr(sys, "stdout", Broken())
    with standard_streams():
        show.say("to nobody")
        sys.stderr.write("a library's words")
        with pytest.raises(UserError, match=r"stdout cannot be written \(Broken pipe\): the result is not printed"):
            show.print_json({})
    assert isinstance(sys.stderr, Broken)


def test_a_terminal_that_goes_away_stops_as_a_signal_does_and_nohup_stays_in_force(monkeypatch):
    monkeypatch.setattr(show, "say_warning", lambda text: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("size", ["0", "-5", "wide", "", "²", "1", "9" * 30])
def test_a_screen_of_no_width_is_taken_for_a_usual_one(monkeypatch, size):
    console.cache_clear()
    try:
        with monkeypatch.context() as patch:  # not a moment longer: pytest reads COLUMNS too
            patch.setenv("COLUMNS", size)
            patch.setenv("LINES", size)
            patch.delenv("TERM", raising=False)
            patch.setattr(sys, "stderr", io.StringIO())
            show.show_table("title", ["name"], [["value"]])
            assert "value" in sys.stderr.getvalue() and console().width == WIDTH_OF_A_LOG
    finally:
        console.cache_clear()


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where nobody knows the home
    monkeypatch.delenv("QLORA_LITE_HOME")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"HOME is not set, .* Set QLORA_LITE_HOME to a folder for the cache"):
        default_cache()
    monkeypatch.setenv("QLORA_LITE_HOME", str(tmp_path))
    assert default_cache() == Path(tmp_path)
