"""Checkpoints on disk: `checkpoints/step-000050/`, complete or absent; the newest few are kept, and the best one.

Written into a staging folder, synced, hashed (manifest last) and renamed, so an incomplete one is never used.
The best one has no special name: `best.step` in the newest one's state.json identifies it, so names and state cannot disagree.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import read_manifest, verify_manifest, write_manifest
from qlora_lite.files.staging import free_bytes, remove_folder, staged_folder
from qlora_lite.training.best import Best
from qlora_lite.training.state import TrainState
from qlora_lite.units import format_bytes

_MARGIN_BYTES = 4 * 2**20  # configs, manifest, and rounding of the file system
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    state: TrainState, folder: Path, *, keep: int, base: Path, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write `folder/step-XXXXXX` for the current state, remove all but the newest `keep` and the best, and return its path.

    `facts` go into its manifest. Replaces a damaged checkpoint of this step. Checkpoints of later steps are damaged too (the run resumed
    from an earlier step), so they do not count and are left in place. Raises RunError, with the bytes needed, if the disk is too full;
    UserError or OSError if writing fails.
    """
    path = folder / f"step-{state.step:06d}"
    if path.exists() and verify_manifest(path):
        remove_folder(path)
    if not path.exists():
        _refuse_full_disk(folder, state.num_bytes() + _MARGIN_BYTES)
        with staged_folder(path) as staging:
            state.save(staging, base=base)
            write_manifest(staging, {"step": state.step, **(facts or {})})
    up_to_now = [old for old in list_checkpoints(folder) if _step_of(old) <= state.step]
    for old in up_to_now[:-keep]:
        if state.best is None or _step_of(old) != state.best.step:
            remove_folder(old)
    return path


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise RunError(
            f"{folder}: a checkpoint needs {format_bytes(needed)}, {format_bytes(free)} are free",
            advice="Free some space",
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first, without checking them."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def newest_valid(folder: Path, *, recipe_sha256: str | None = None) -> tuple[Path | None, list[str]]:
    """-> (the newest valid checkpoint, None if there is none; one problem per newer checkpoint).

    A checkpoint is valid if its files are unchanged and, with `recipe_sha256`, no other recipe wrote it.
    """
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        damage = verify_manifest(path) or _of_another_recipe(path, recipe_sha256)
        if not damage:
            return path, problems
        problems.append(f"{path.name} is not used: {damage[0]}")
    return None, problems


def best_valid(folder: Path, best: Best | None) -> tuple[Path | None, list[str]]:
    """-> (the checkpoint of the lowest validation loss, or the newest valid one if that is missing or damaged; problems)."""
    if best is None:
        return newest_valid(folder)
    path = folder / f"step-{best.step:06d}"
    damage = verify_manifest(path)
    if not damage:
        return path, []
    newest, problems = newest_valid(folder)
    return newest, [f"{path.name}, the best checkpoint, is not used; using the newest instead: {damage[0]}", *problems]


def _of_another_recipe(path: Path, recipe_sha256: str | None) -> list[str]:
    written_by = (read_manifest(path) or {}).get("recipe_sha256")
    return ["written by another recipe"] if recipe_sha256 and written_by not in (None, recipe_sha256) else []


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
