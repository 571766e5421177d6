"""How long threads spin is chosen from the load, once, before torch is loaded; what the user says stays."""

import os
import subprocess
import sys

import pytest

from qlora_lite.device import waiting
from qlora_lite.device.waiting import TURNS_BUSY, TURNS_QUIET, choose_spinning, num_others_running


@pytest.fixture
def load(tmp_path, monkeypatch):
    path = tmp_path / "loadavg"
    monkeypatch.setattr(waiting, "_LOAD", path)
    monkeypatch.setattr(waiting.os, "cpu_count", lambda: 8)
    return path


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("9.00 9.00 9.00 1/120 4711\n", TURNS_QUIET),  # the averages are of the past
        ("0.00 0.00 0.00 2/120 4711\n", TURNS_QUIET),
        ("0.00 0.00 0.00 3/120 4711\n", TURNS_BUSY),
        ("", TURNS_QUIET),
        ("what is this", TURNS_QUIET),
        ("0.00 0.00 0.00 many/120 4711\n", TURNS_QUIET),
    ],
)
def test_a_machine_that_is_busy_now_gets_a_short_spin(load, text, turns):
    load.write_text(text)
    environment: dict[str, str] = {}
    choose_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(turns)}


def test_where_no_system_says_the_machine_is_taken_for_quiet(load):
    environment: dict[str, str] = {}
    choose_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(TURNS_QUIET)}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_stays(load, name):
    environment = {name: "as I say"}
    choose_spinning(environment)
    assert environment == {name: "as I say"}


@pytest.mark.skipif(not waiting._LOAD.exists(), reason="no /proc")
def test_a_loop_beside_us_is_seen():
    before = num_others_running(waiting._LOAD)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert any(num_others_running(waiting._LOAD) >= before + 1 for _ in range(2_000_000))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def test_it_is_set_when_the_package_is_imported():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    script = "import os, sys, qlora_lite; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    turns, has_torch = done.stdout.split()
    assert int(turns) in (TURNS_QUIET, TURNS_BUSY) and has_torch == "False"


def test_a_team_is_kept_while_other_programs_run_and_only_then():
    """A second team of threads is what makes libgomp's waits short; results stay the same."""
    script = """
import os, sys, time
os.environ["OMP_NUM_THREADS"] = "2"
import torch
from qlora_lite.device.waiting import ShortWaits

def threads():
    return len(os.listdir("/proc/self/task"))

def soon(expected):
    for _ in range(200):  # a team ends a moment after its thread
        if threads() == expected:
            return True
        time.sleep(0.02)
    return False

work = lambda: torch.ones(2**22).sum()
work()
before = threads()
with ShortWaits(work) as waits:
    waits.follow(0.0)
    assert threads() == before
    waits.follow(float(os.cpu_count()))
    busy = threads()
    waits.follow(float(os.cpu_count()))
    assert busy == threads() == before + 2, (before, busy, threads())
    assert work() == 2**22
    waits.follow(0.0)
    assert soon(before)
    waits.follow(float(os.cpu_count()))
assert soon(before)
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
with ShortWaits(work) as waits:
    waits.follow(float(os.cpu_count()))
    assert threads() == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
