"""What may have changed when a run is resumed, what is said of it, and what is refused: by the command line, on a run that was stopped."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_lite import api
from qlora_lite.files.manifest import read_manifest, sha256_of_file, write_manifest
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.folder import RunDir
from tests.tiny_run import run_cli, train_cli, write_recipe


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml`, its data and `run`, which was stopped after its second step of four."""
    folder = tmp_path_factory.mktemp("stopped")
    plan = api.make_plan(load_recipe(write_recipe(folder)))
    steps = list(
        api.train(
            plan,
            api.load_model(plan),
            folder / "run",
            should_stop=lambda: len(RunDir(folder / "run").read_steps()) == 2,
        )
    )
    assert [each.step for each in steps] == [1, 2]
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the run, to go on with; recipe and data stay in `stopped`."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path


def go_on(stopped: Path, folder: Path, *words: str):
    return train_cli(stopped / "tiny.yaml", folder / "run", "--resume", *words)


def test_a_checkpoint_says_what_it_was_computed_with(stopped: Path) -> None:
    manifest = read_manifest(stopped / "run" / "checkpoints" / "step-000002")
    assert manifest is not None and manifest["step"] == 2
    assert len(manifest["recipe_sha256"]) == 64 and manifest["num_threads"] >= 1
    assert {"torch", "bitsandbytes", "qlora-lite"} <= manifest["versions"].keys()


def test_the_run_keeps_the_sha_256_of_its_data_files(stopped: Path) -> None:
    kept = json.loads((stopped / "run" / "env.json").read_text())["data_sha256"]
    assert kept == {str(stopped / name): sha256_of_file(stopped / name) for name in ("train.json", "test.json")}


def test_what_changes_nothing_that_is_trained_may_differ_is_said_and_becomes_the_runs(
    stopped: Path, folder: Path
) -> None:
    done = go_on(stopped, folder, "--set", "merge.rounding=nearest", "--set", "train.keep_checkpoints=5")
    assert done.code == 0, done.stderr
    assert "merge.rounding was stochastic, is nearest from now on; it does not affect training" in done.stderr
    assert "train.keep_checkpoints was 2, is 5 from now on" in done.stderr
    assert "rounding: nearest" in (folder / "run" / "recipe.yaml").read_text()
    assert run_cli("verify", folder / "run").code == 0
    assert run_cli("merge", folder / "run", "--json").json["rounding"] == "nearest"


def test_what_is_trained_may_not_differ(stopped: Path, folder: Path) -> None:
    done = go_on(stopped, folder, "--set", "lora.r=8", "--set", "merge.rounding=nearest")
    assert done.code == 2 and "cannot resume with another recipe: lora.r was 16, is 8" in done.stderr
    assert "rounding: stochastic" in (folder / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["train.json", "test.json"])
def test_a_data_file_that_has_changed_is_refused_with_both_hashes(stopped: Path, folder: Path, name: str) -> None:
    before = (stopped / name).read_bytes()
    try:
        document = json.loads(before)
        document["data"][0]["title"] = "another"
        (stopped / name).write_text(json.dumps(document))
        done = go_on(stopped, folder)
    finally:
        (stopped / name).write_bytes(before)
    assert done.code == 2 and "the data have changed since the run began" in done.stderr, done.stderr
    assert f"{name} (SHA-256 " in done.stderr and "now " in done.stderr
    assert go_on(stopped, folder).code == 0  # put back, it goes on


def test_other_threads_and_versions_are_said(stopped: Path, folder: Path) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step-000002"
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    facts = {key: value for key, value in manifest.items() if key not in ("files", "schema_version", "sha256")}
    write_manifest(checkpoint, facts | {"num_threads": 64, "versions": facts["versions"] | {"torch": "2.0.0"}})
    done = go_on(stopped, folder)
    assert done.code == 0
    assert "the number of threads was 64, is " in done.stderr and "OMP_NUM_THREADS=64 keeps them" in done.stderr
    assert "versions have changed, so the last bits may differ: torch 2.0.0 -> " in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(stopped: Path, folder: Path) -> None:
    damaged = folder / "run" / "checkpoints" / "step-000002" / "state.json"
    damaged.write_text(damaged.read_text() + " ")
    done = go_on(stopped, folder)
    assert (
        done.code == 0
        and "step-000002 is not used: " in done.stderr
        and "no checkpoint yet: training starts at step 1" in done.stderr
    )
    assert run_cli("verify", folder / "run").code == 0  # it was written anew when its step came again


def test_a_log_whose_sealed_part_has_changed_is_refused_with_what_to_do(stopped: Path, folder: Path) -> None:
    log = folder / "run" / "steps.jsonl"
    log.write_text(log.read_text().replace('"step": 1', '"step": 7', 1))
    done = go_on(stopped, folder)
    assert done.code == 2 and "steps.jsonl: damaged (its lines up to the last checkpoint have changed)" in done.stderr


def test_resuming_where_nothing_was_trained_yet_begins_the_run(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = go_on(stopped, tmp_path)
    assert done.code == 0 and "nothing was trained here yet; the run begins at step 1" in done.stderr
    again = go_on(stopped, tmp_path)
    assert again.code == 2 and "is finished" in again.stderr


def test_a_finished_run_whose_page_is_missing_gets_it(stopped: Path, folder: Path) -> None:
    assert go_on(stopped, folder).code == 0
    (folder / "run" / "report.html").unlink()
    done = go_on(stopped, folder, "--json")
    assert done.json["num_steps"] == 4 and (folder / "run" / "report.html").is_file()
