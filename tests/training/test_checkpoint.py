"""Checkpoints: whole or not there; the newest valid one and the best are found; these and the newest few are kept."""

import shutil
from collections import namedtuple

import pytest

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import verify_manifest
from qlora_lite.training.best import Best
from qlora_lite.training.checkpoint import best_valid, list_checkpoints, newest_valid, save_checkpoint


class State:
    """Stands for a TrainState: a step, and one file."""

    def __init__(self, step=0, best=None):
        self.step, self.best = step, best

    def num_bytes(self):
        return 100

    def save(self, folder, *, base):
        (folder / "state.json").write_text(f"{base} {self.step}")


class KilledState(State):
    def save(self, folder, *, base):
        super().save(folder, base=base)
        raise KeyboardInterrupt


def save(folder, *steps, keep=9):
    for step in steps:
        path = save_checkpoint(State(step), folder, keep=keep, base="base")
        assert path == folder / f"step-{step:06d}"


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def damage(folder, step):
    (folder / f"step-{step:06d}" / "state.json").write_text("base X")


def test_the_newest_valid_one_is_found_and_each_damaged_one_is_named(tmp_path):
    save(tmp_path, 5, 10, 15)
    assert newest_valid(tmp_path) == (tmp_path / "step-000015", [])
    damage(tmp_path, 15)
    (tmp_path / "step-000010" / "manifest.json").unlink()
    path, problems = newest_valid(tmp_path)
    assert path == tmp_path / "step-000005"
    assert problems[0].startswith("step-000015 is not used: ") and "state.json" in problems[0]
    assert problems[1].startswith("step-000010 is not used: ") and "manifest.json: missing" in problems[1]


def test_no_checkpoints_are_no_error(tmp_path):
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    assert newest_valid(tmp_path) == (None, [])


def test_a_run_killed_while_saving_leaves_nothing_to_be_found(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(KilledState(10), tmp_path, keep=1, base="base")
    assert names(tmp_path) == ["step-000005"]
    staged = tmp_path / ".step-000010.abcd.staging"  # what a kill -9 would leave
    shutil.copytree(tmp_path / "step-000005", staged)
    assert newest_valid(tmp_path) == (tmp_path / "step-000005", [])


def test_the_newest_few_are_kept_in_the_order_of_their_steps(tmp_path):
    save(tmp_path, 999_998, 999_999, 1_000_000, 1_000_001, keep=3)
    assert names(tmp_path) == ["step-999999", "step-1000000", "step-1000001"]


def test_a_good_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    save(tmp_path, 5)
    stamp = (tmp_path / "step-000005" / "state.json").stat().st_mtime_ns
    save(tmp_path, 5)
    assert (tmp_path / "step-000005" / "state.json").stat().st_mtime_ns == stamp


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 5, 10)
    damage(tmp_path, 10)
    save(tmp_path, 10)
    assert verify_manifest(tmp_path / "step-000010") == []
    assert newest_valid(tmp_path) == (tmp_path / "step-000010", [])


def test_damaged_checkpoints_of_later_steps_do_not_push_out_good_ones(tmp_path):
    save(tmp_path, 5, 10, 15)
    damage(tmp_path, 10)
    damage(tmp_path, 15)
    save(tmp_path, 7, keep=1)  # resumed from 5
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000007"


def test_the_best_one_is_kept_besides_the_newest_few(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(State(step, best=Best(1, 0.5)), tmp_path, keep=2, base="base")
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000004"]
    save_checkpoint(State(5, best=Best(4, 0.4)), tmp_path, keep=1, base="base")  # a new best lets the old one go
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_the_best_one_is_found_and_when_it_is_damaged_the_newest_takes_its_place_out_loud(tmp_path):
    save(tmp_path, 5, 10)
    assert best_valid(tmp_path, None) == (tmp_path / "step-000010", [])
    assert best_valid(tmp_path, Best(5, 0.5)) == (tmp_path / "step-000005", [])
    damage(tmp_path, 5)
    path, problems = best_valid(tmp_path, Best(5, 0.5))
    assert path == tmp_path / "step-000010"
    assert problems[0].startswith("step-000005, the best checkpoint, is not used; using the newest instead: ")


def test_a_checkpoint_that_has_no_room_is_refused_with_bytes_needed_and_free_and_costs_no_older_one(
    tmp_path, monkeypatch
):
    save(tmp_path, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10, 7, 3 << 20))
    with pytest.raises(RunError, match=r"a checkpoint needs 4 MiB, 3 MiB are free"):
        save_checkpoint(State(10), tmp_path, keep=1, base="base")
    assert names(tmp_path) == ["step-000005"]


def test_a_checkpoint_of_another_recipe_is_named_and_not_used(tmp_path):
    for step, recipe in ((5, "mine"), (10, "other")):
        save_checkpoint(State(step), tmp_path, keep=9, base="base", facts={"recipe_sha256": recipe})
    path, problems = newest_valid(tmp_path, recipe_sha256="mine")
    assert path == tmp_path / "step-000005" and problems == ["step-000010 is not used: written by another recipe"]
