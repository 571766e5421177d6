"""A run's folder: what it refuses, and what survives a bad moment."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite.errors import RunError
from qlora_lite.runs.folder import RunDir


def started(path: Path) -> RunDir:
    run = RunDir.create(path)
    run.recipe.write_text("method: qlora\n")
    return run


def test_a_folder_that_holds_something_is_never_taken_for_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        RunDir.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_a_missing_one_become_a_run(tmp_path: Path) -> None:
    assert list(RunDir.create(tmp_path).path.iterdir()) == []
    assert RunDir.create(tmp_path / "a" / "b").path.is_dir()


@pytest.mark.parametrize(("below", "why"), [("file", "is a file"), ("file/run", "Not a directory")])
def test_a_file_in_its_place_is_named(tmp_path: Path, below: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=why):
        RunDir.create(tmp_path / below)


def test_a_failure_before_anything_was_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDir.creating(tmp_path / "runs" / "one"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_run_has_begun_leaves_it_there_and_before_it_nothing(tmp_path: Path) -> None:
    for name, begins in (("begun", True), ("unbegun", False)):
        with pytest.raises(ZeroDivisionError), RunDir.creating(tmp_path / "runs" / name) as run:
            run.write_json("plan.json", {})
            if begins:
                run.write_text("recipe.yaml", "method: qlora\n")
            raise ZeroDivisionError
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"begun"}
    assert (tmp_path / "runs" / "begun" / "plan.json").is_file()


def test_a_failure_does_not_remove_an_empty_folder_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDir.creating(tmp_path):
        raise ZeroDivisionError
    assert tmp_path.is_dir()


def test_a_folder_without_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run: recipe\.yaml is missing"):
        RunDir.open(tmp_path)


def test_the_next_free_number_skips_files_as_well(tmp_path: Path) -> None:
    (tmp_path / "mine-1").mkdir()
    (tmp_path / "mine-2").write_text("")
    assert RunDir.claim_next(tmp_path, "mine") == (tmp_path / "mine-3", [tmp_path / "mine-3"])


def test_two_trainings_at_once_get_folders_of_their_own_which_go_again_when_nothing_was_trained(tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    first, made = RunDir.claim_next(parent, "mine")
    second, also_made = RunDir.claim_next(parent, "mine")
    assert (first.name, second.name) == ("mine-1", "mine-2")
    for path, folders in ((second, also_made), (first, made)):
        with pytest.raises(ZeroDivisionError), RunDir.creating(path, made=folders):
            raise ZeroDivisionError
    assert not parent.exists() and tmp_path.exists()


def test_json_comes_back_with_its_schema_version_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.write_json("plan.json", {"fits": True})
    assert run.read_json("plan.json") == {"schema_version": 1, "fits": True}
    assert run.read_json("merge.json") == {}
    assert sorted(path.name for path in run.path.iterdir()) == [
        "manifest.json",
        "plan.json",
        "recipe.yaml",
    ]  # no staging file


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_a_damaged_json_file_is_named(tmp_path: Path, text: str) -> None:
    run = started(tmp_path / "run")
    (run.path / "eval.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"eval\.json: damaged"):
        run.read_json("eval.json")


def test_a_half_written_line_is_left_out_and_resuming_writes_after_a_whole_one(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_step({"step": step})
    with run.steps.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [step["step"] for step in run.read_steps()] == [1, 2, 3]
    run.cut_steps(2)
    run.append_step({"step": 3, "again": True})
    assert run.read_steps() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("write", ["write_json", "cut_steps", "write_predictions"])
def test_a_full_disk_names_the_file_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    run = started(tmp_path / "run")
    name = {"write_json": "eval.json", "cut_steps": "steps.jsonl", "write_predictions": "predictions.jsonl"}[write]
    (run.path / name).write_text('{"step": 1}\n')

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = {"write_json": ("eval.json", {}), "cut_steps": (0,), "write_predictions": ([],)}[write]
    with pytest.raises(RunError, match=rf"{name}: cannot be written \(No space left on device\)"):
        getattr(run, write)(*arguments)
    assert (run.path / name).read_text() == '{"step": 1}\n'
    assert sorted(path.name for path in run.path.iterdir()) == sorted([name, "recipe.yaml"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_step_that_cannot_be_logged_names_the_log_and_is_written_with_the_next_one(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.steps.symlink_to("/dev/full")
    assert run.append_step({"step": 1}) == f"{run.steps}: cannot be written (No space left on device)"
    with pytest.raises(RunError, match=r"steps\.jsonl: cannot be written \(No space left on device\)"):
        run.seal_steps()
    run.steps.unlink()
    assert run.append_step({"step": 2}) is None
    assert [step["step"] for step in run.read_steps()] == [1, 2]


def test_sealed_lines_may_be_added_to_and_not_changed(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.append_step({"step": 1})
    run.seal_steps()
    run.append_step({"step": 2})
    assert [step["step"] for step in run.read_steps()] == [1, 2]
    run.steps.write_text(run.steps.read_text().replace("1", "3"))
    with pytest.raises(RunError, match=r"steps\.jsonl: damaged \(its lines up to the last checkpoint have changed\)"):
        run.read_steps()


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    code = "import sys; from qlora_lite.runs.folder import RunDir\n"
    code += "with RunDir(sys.argv[1]).locked(): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing to this run"), run.locked():
            pass
        other.kill()
    with run.locked(), run.locked():  # again from inside is no harm
        pass


def test_what_a_killed_process_left_half_written_goes_when_the_run_is_taken_up(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for folder in (run.path / ".merged.12ab.staging", run.checkpoints / ".step-000002.12ab.staging"):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
    (run.path / ".eval.json.77.tmp").write_text("{")
    with run.locked():
        pass
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "recipe.yaml"]
    assert list(run.checkpoints.iterdir()) == []


def test_a_folder_in_which_nothing_was_trained_yet_may_become_a_run(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    run.write_json("plan.json", {})
    assert RunDir.is_unbegun(run.path) and not RunDir.is_unbegun(tmp_path / "nowhere")
    assert list(RunDir.create(run.path).path.iterdir()) == []
    run.write_text("recipe.yaml", "method: qlora\n")
    assert not RunDir.is_unbegun(run.path)


def test_a_name_that_is_no_utf_8_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not UTF-8"):
        RunDir.create(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    assert list(tmp_path.iterdir()) == []
