"""`qlora-lite verify`: a changed bit anywhere is found, missing and extra files are named, and nothing is loaded that has changed."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lite.files.manifest import Checked, check_folder, read_manifest, seal
from qlora_lite.runs.records import check_records
from qlora_lite.runs.verify import verify_folder
from tests.tiny_run import run_cli, train_cli, write_recipe

NUM_FLIPS = 200


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and merged."""
    folder = tmp_path_factory.mktemp("verify")
    run = folder / "run"
    assert train_cli(write_recipe(folder), run).code == 0
    assert run_cli("merge", run).code == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def wrong_in(run: Path) -> dict[str, str]:
    return {found.path: str(found.why) for found in verify_folder(run) if not found.ok}


def test_a_finished_run_is_as_it_was_written_and_every_file_of_it_was_looked_at(run: Path) -> None:
    done = run_cli("verify", run, "--json")
    assert done.code == 0 and done.json["ok"] is True
    looked_at = {file["path"] for file in done.json["files"]}
    assert looked_at == {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"manifest.json", "steps.jsonl", "adapter/manifest.json", "merged/model.safetensors"} <= looked_at
    assert all(file["ok"] and file["why"] is None for file in done.json["files"])


def checked_anew(run: Path, name: str) -> Iterator[Checked]:
    """What verify would say of the folder that holds `name`, without the rest of the run."""
    part = next((part for part in (run / name).parents if part != run and (part / "manifest.json").exists()), run)
    return check_records(run) if part == run else check_folder(part)


def test_every_single_flipped_bit_of_every_file_is_found(run: Path) -> None:
    numbers = random.Random(0)
    names = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert len(names) > 25
    for name in names:
        data = bytearray((run / name).read_bytes())
        for place in (numbers.randrange(8 * len(data)) for _ in range(NUM_FLIPS)):
            data[place // 8] ^= 1 << place % 8
            with (run / name).open("r+b") as file:
                file.seek(place // 8)
                file.write(data[place // 8 : place // 8 + 1])
            assert not all(found.ok for found in checked_anew(run, name)), f"{name}: bit {place}"
            data[place // 8] ^= 1 << place % 8
        (run / name).write_bytes(data)
    assert wrong_in(run) == {}


def test_missing_and_extra_files_are_named_and_the_exit_code_is_2(run: Path) -> None:
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "merged" / "extra.bin").write_bytes(b"x")
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "mine").mkdir()
    (run / "merged" / "link.txt").symlink_to("/etc/hostname")
    done = run_cli("verify", run)
    assert done.code == 2 and "damaged" in done.last_line
    wrong = wrong_in(run)
    assert wrong["adapter/adapter_config.json"] == "missing"
    extra = "was put here by something else"
    assert all(
        extra in wrong[name] for name in ("merged/extra.bin", "notes.txt", "checkpoints/mine", "merged/link.txt")
    )


def test_a_folder_that_is_no_run_and_has_no_manifest_is_refused(tmp_path: Path) -> None:
    done = run_cli("verify", tmp_path)
    assert done.code == 2 and "neither a run nor a folder with a manifest.json" in done.stderr


def test_a_merged_model_that_was_copied_elsewhere_is_verified_by_itself(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run / "merged", tmp_path / "copied"))
    assert run_cli("verify", copied).code == 0
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert run_cli("verify", copied).code == 2


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("adapter/adapter_model.safetensors", ("ask", "Why?")),
        ("adapter/adapter_config.json", ("eval",)),
        ("merged/model.safetensors", ("eval", "--which", "merged")),
        ("recipe.yaml", ("eval",)),
        ("env.json", ("ask", "Why?")),
    ],
)
def test_nothing_is_loaded_that_has_changed(run: Path, name: str, command: tuple[str, ...]) -> None:
    flip_last_byte(run / name)
    done = run_cli(command[0], run, *command[1:])
    assert done.code == 2 and Path(name).name in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_report_of_a_damaged_run_names_what_has_changed(run: Path) -> None:
    flip_last_byte(run / "predictions.jsonl")
    done = run_cli("report", run)
    assert "predictions.jsonl: contents changed" in done.stderr.replace("\n", " "), done.stderr


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:/x", "", "a//b"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "manifest.json").write_text(seal({"files": {name: {"bytes": 0, "sha256": "0" * 64}}}))
    assert read_manifest(tmp_path) is None


def test_a_manifest_has_one_spelling(run: Path) -> None:
    path = run / "adapter" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # the same document
    assert read_manifest(path.parent) is None
