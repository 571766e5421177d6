"""`doctor`: it says what is here, stops with 2 where training cannot work, and keeps what it measured."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from qlora_lite.base.bnb import native_library, runs_downloaded_kernel
from qlora_lite.commands import doctor, overheads
from qlora_lite.commands.doctor import OK, PROBLEM, WARNING
from qlora_lite.memory.kept import disk_speed
from qlora_lite.memory.measuring import give_back_free_memory
from tests.conftest import REPOSITORY
from tests.tiny_run import run_cli

GIB = 2**30


def run_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`qlora-lite doctor` in a process of its own; `path` stands before every library."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (path, REPOSITORY) if p)}
    command = [sys.executable, "-m", "qlora_lite", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)


def test_this_machine_is_found_able_to_train():
    done = run_doctor("--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["can_train"] is True and found["measured"] is None
    assert not [finding for finding in found["findings"] if finding["level"] == PROBLEM]
    assert all(finding["advice"] for finding in found["findings"] if finding["level"] == WARNING)
    for name in doctor.LIBRARIES:
        assert found["versions"][name]["version"] == metadata.version(name)
    assert found["versions"]["torch"]["wanted"].startswith(">=2.")
    assert found["cpu"]["num_threads"] >= 1 and found["kernels"] == {"is_installed": False, "is_loaded": False}
    assert 0 < found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]
    assert found["cache"]["path"] == os.environ["QLORA_LITE_HOME"] and found["cache"]["free_bytes"] > 0
    assert len(found["cards"]) == torch.cuda.device_count()
    assert done.stderr.strip().endswith("training works here")


def test_a_broken_library_is_a_problem_with_exit_code_2_and_not_a_traceback(tmp_path):
    (tmp_path / "peft.py").write_text("raise OSError('libfoo.so: cannot open shared object file')")
    done = run_doctor("--measure", "--json", path=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    (problem,) = [finding for finding in found["findings"] if finding["level"] == PROBLEM]
    assert problem["what"] == "peft" and "OSError: libfoo.so" in problem["found"] and "pip install" in problem["advice"]
    assert found["can_train"] is False and found["measured"] is None  # nothing to measure with


def test_without_torch_what_needs_it_is_left_out_and_the_rest_is_looked_at(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = run_doctor("--json", path=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 2 and found["cpu"] is None and found["cards"] is None and found["memory"]["total_bytes"]
    assert {f["what"] for f in found["findings"] if f["level"] == PROBLEM} >= {"torch", "peft", "bitsandbytes"}


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LITE_HOME", str(tmp_path / "file" / "cache"))
    done = run_cli("doctor")
    assert done.code == 2 and "problem  cache" in done.stderr and "QLORA_LITE_HOME" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "level", "words"),
    [
        ("", OK, "within"),
        (f">={metadata.version('filelock')}", OK, "within"),
        (">=900,<901", PROBLEM, "older than >=900,<901"),
        (">=0.1,<0.2", WARNING, "newer than >=0.1,<0.2"),
    ],
)
def test_a_version_too_old_is_a_problem_and_one_not_tested_a_warning(wanted, level, words):
    finding, version = doctor.library_finding("filelock", SpecifierSet(wanted))
    assert (finding.level, version) == (level, metadata.version("filelock")) and words in finding.found


def test_a_library_that_is_not_there_is_a_problem():
    finding, version = doctor.library_finding("no-such-library", SpecifierSet(">=1"))
    assert (finding.level, version) == (PROBLEM, None) and "pip install" in finding.advice


def test_ranges_are_those_of_the_package_without_extras():
    _, wanted = doctor.own_requirements()
    assert set(doctor.LIBRARIES) <= wanted.keys() and not {"pytest", "wandb"} & wanted.keys()


CARD = {
    "name": "A card",
    "compute_capability": "8.6",
    "total_bytes": 24 * GIB,
    "free_bytes": 23 * GIB,
    "has_bf16": True,
}


@pytest.mark.parametrize(
    ("changes", "archs", "level", "words"),
    [
        ({}, ["sm_80", "sm_90"], OK, "computes in bf16"),
        ({"free_bytes": 8 * GIB}, ["sm_86"], WARNING, "8 GiB free"),
        ({"compute_capability": "7.5", "has_bf16": False}, ["sm_75"], WARNING, "no bf16"),
        ({"compute_capability": "6.1", "has_bf16": False}, ["sm_75", "sm_86"], PROBLEM, "no code for it"),
    ],
)
def test_what_is_said_of_a_card(changes, archs, level, words):
    finding = doctor.card_finding(CARD | changes, archs=archs)
    assert finding.level == level and words in finding.found and bool(finding.advice) == (level != OK)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ("8.9", ["sm_86"], True),
        ("8.0", ["sm_86"], False),
        ("9.0", ["sm_80"], False),
        ("9.0", ["sm_80", "compute_80"], True),
        ("12.0", ["sm_90a", "sm_120"], True),
    ],
)
def test_code_runs_on_later_cards_of_its_major_version_and_ptx_on_all(capability, archs, runs):
    assert doctor.has_code_for(capability, archs) is runs


def test_bitsandbytes_is_looked_at_by_names_that_are_there():
    path, error = native_library()
    assert error is None and path is not None and Path(path).name.startswith("libbitsandbytes")
    assert runs_downloaded_kernel() is False


def test_dequantizing_is_priced_in_tokens_of_a_product():
    found = overheads.dequantize_price("cpu", num_rounds=3, shape=(64, 128), num_tokens=(4, 8))
    assert [product["num_tokens"] for product in found["products"]] == [4, 8]
    assert found["dequantize_tokens"]["num"] == 6
    for product in found["products"]:
        assert 0 < product["dequantize_tokens"]["low"] <= product["dequantize_tokens"]["median"]
    assert overheads.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "num": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth_of_the_process_is_what_work_takes_and_gives_back():
    def take() -> None:
        torch.zeros(64 * 2**20, dtype=torch.uint8).fill_(1)

    give_back_free_memory()  # of earlier tests, which `take` would be given
    growth = overheads.rss_growth(take)
    if growth is None:
        pytest.skip("this system does not forget the highest memory so far")
    assert 60 * 2**20 < growth < 80 * 2**20


def test_what_was_measured_with_other_versions_is_said_to_be_old():
    measured = {"measured_at": "2026-01-01", "device": "cpu", "versions": {"torch": "2.10"}, "load_average": 100.0}
    old, busy = doctor.measured_findings(measured, versions={"torch": {"version": "2.13"}})
    assert old.level == WARNING and "other versions of torch" in old.found and "--measure" in old.advice
    assert busy.level == WARNING and "busy" in busy.found
    assert list(doctor.measured_findings(None, versions={})) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON"])
def test_a_damaged_kept_file_is_none(text, tmp_path):
    (tmp_path / doctor.KEPT).write_text(text)
    assert doctor.kept_measurement(tmp_path / doctor.KEPT) is None


def test_how_fast_the_disk_is_written_is_measured_and_told_to_plans(tmp_path):
    rate = overheads.disk_write_rate(tmp_path, num_bytes=2**20)
    assert rate["num"] == 3 and 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert not list(tmp_path.iterdir())
    assert disk_speed(tmp_path) == {"disk_write_bytes_per_s": None}
    (tmp_path / doctor.KEPT).write_text(json.dumps({"versions": {}, "disk_write_bytes_per_s": rate}))
    assert disk_speed(tmp_path) == {"disk_write_bytes_per_s": rate["median"]}
    for damaged in (7, [1], {"median": "fast"}, {"median": -1.0}):
        (tmp_path / doctor.KEPT).write_text(json.dumps({"versions": {}, "disk_write_bytes_per_s": damaged}))
        assert disk_speed(tmp_path) == {"disk_write_bytes_per_s": None}


@pytest.mark.slow
def test_what_is_measured_is_kept_and_shown_again(monkeypatch):
    """In a process of its own; products with a weight, most of the time, in 2 rounds in place of 9."""
    monkeypatch.setattr(overheads, "NUM_ROUNDS", 2)
    done = run_cli("doctor", "--measure", "--json")
    assert done.code == 0, done.stderr
    measured = done.json["measured"]
    kept = json.loads((Path(os.environ["QLORA_LITE_HOME"]) / doctor.KEPT).read_text())
    assert measured == kept and kept["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert kept["dequantize"]["dequantize_tokens"]["low"] > 0 and kept["dequantize"]["dequantize_s"]["num"] == 2
    assert kept["disk_write_bytes_per_s"]["low"] > 2**20
    if kept["device"] == "cpu":
        assert kept["imports_rss_bytes"] > 100 * 2**20
        assert kept["step_peak_bytes"] > 50 * 2**20
        growth = kept["step_rss_growth_bytes"]
        assert growth is None or growth["median"] > 0.5 * kept["step_peak_bytes"]
    again = run_cli("doctor", "--json").json
    assert again["measured"] == kept
    assert any(finding["what"] == "measured" for finding in again["findings"])


@pytest.mark.gpu
def test_a_card_is_seen_and_measured():
    done = run_doctor("--measure", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cards"][0]["total_bytes"] > found["cards"][0]["free_bytes"] > 0
    measured = found["measured"]
    assert measured["context_bytes"] > 50 * 2**20 and measured["cublas_workspace_bytes"] >= 0
    assert measured["fragmentation_bytes"] >= 0 and measured["step_allocated_bytes"] > 100 * 2**20
