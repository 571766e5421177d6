"""A run folder that an earlier version made (commit 942e5b8, killed after step 3 of 4) resumes, verifies, merges and answers.

Its recipe has absolute paths, so the folder is copied to where it was made.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lite.runs.folder import RunDir
from tests.conftest import REPOSITORY
from tests.tiny_run import run_cli, train_cli

STORED = REPOSITORY / "tests" / "runs" / "old_run"
PLACE = Path("/tmp/qlora-lite-old-run")
LOSSES = [
    6.165509600972021,
    6.0856374104817705,
    6.005885731090199,
    6.140829396802325,
]  # of the same run, never stopped, then


@pytest.fixture
def place() -> Iterator[Path]:
    shutil.rmtree(PLACE, ignore_errors=True)  # of a test that was killed
    try:
        PLACE.mkdir()
    except OSError as error:
        pytest.skip(f"{PLACE}: {error.strerror}; the stored run names this folder")
    try:
        shutil.copytree(STORED, PLACE, dirs_exist_ok=True)
        yield PLACE
    finally:
        shutil.rmtree(PLACE)


def test_a_run_of_an_earlier_version_is_resumed_verified_merged_and_asked(place: Path) -> None:
    run = place / "run"
    assert run_cli("verify", run, "--json").json["ok"]
    done = train_cli(place / "tiny.yaml", run, "--resume", "--set", "model.dtype=fp32", "--set", "lora.r=2", "--json")
    assert done.code == 0, done.stderr
    assert "continues after step 2" in done.stderr
    assert [step["loss"] for step in RunDir(run).read_steps()] == pytest.approx(LOSSES, rel=1e-4)
    merged = run_cli("merge", run, "--json").json
    assert merged["arithmetic_ratio"] < 0.01 and (run / "merged" / "model.safetensors").is_file()
    assert run_cli("ask", run, "Where?", "--json").code == 0
    assert run_cli("verify", run, "--json").json["ok"]
