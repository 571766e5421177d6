"""Checkpoints on disk: `checkpoints/step-000050/`, whole or not there; the newest few are kept, and the best one.

Written into a staging folder, synced, hashed (manifest last) and renamed, so a half-written one is never picked up.
The best one has no name of its own: `best.step` in the newest one's state.json says which it is, so the two cannot disagree.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import read_manifest, verify_manifest, write_manifest
from qlora_lite.files.staging import remove_folder, staged_folder
from qlora_lite.training.best import Best
from qlora_lite.training.state import TrainState
from qlora_lite.units import format_bytes

_MARGIN_BYTES = 4 * 2**20  # configs, manifest, and what a file system rounds up to
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(
    state: TrainState, folder: Path, *, keep: int, base: Path, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write `folder/step-XXXXXX` for the state as it is now, and remove all but the newest `keep` and the best; returns its path.

    `facts` go into its manifest. A damaged one of this step is replaced. Ones of later steps are damaged too (the run came back to an
    earlier step), so they count for nothing and are left where they are. Raises RunError, with the bytes it needs, when the disk has not
    the room; UserError or OSError when it turns out only while writing.
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
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    if free < needed:
        raise RunError(
            f"{folder}: a checkpoint needs {format_bytes(needed)}, {format_bytes(free)} are free",
            advice="Free some room",
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; their contents are not looked at."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def newest_valid(folder: Path, *, recipe_sha256: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with each newer one.

    With `recipe_sha256`, one that another recipe wrote is not valid either.
    """
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        wrong = verify_manifest(path) or _of_another_recipe(path, recipe_sha256)
        if not wrong:
            return path, problems
        problems.append(f"{path.name} is not used: {wrong[0]}")
    return None, problems


def best_valid(folder: Path, best: Best | None) -> tuple[Path | None, list[str]]:
    """The checkpoint of the lowest validation loss, or the newest valid one where there is none or it is damaged."""
    if best is None:
        return newest_valid(folder)
    path = folder / f"step-{best.step:06d}"
    wrong = verify_manifest(path)
    if not wrong:
        return path, []
    newest, problems = newest_valid(folder)
    return newest, [f"{path.name}, the best one, is not used, the newest is: {wrong[0]}", *problems]


def _of_another_recipe(path: Path, recipe_sha256: str | None) -> list[str]:
    written_by = (read_manifest(path) or {}).get("recipe_sha256")
    return ["another recipe wrote it"] if recipe_sha256 and written_by not in (None, recipe_sha256) else []


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
