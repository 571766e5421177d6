"""Checkpoints on disk: `checkpoints/step-000050/`, whole or not there; the newest few are kept, and the best one.

Written into a staging folder, synced, hashed (manifest last) and renamed, so a half-written one is never picked up.
The best one has no name of its own: `best.step` in the newest one's state.json says which it is, so the two cannot disagree.
"""

import re
import shutil
from pathlib import Path

from qlora_lite.model.manifest import verify_manifest, write_manifest
from qlora_lite.model.staging import staged_folder
from qlora_lite.train.best import Best
from qlora_lite.train.state import TrainState

_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(state: TrainState, folder: Path, *, keep: int, base: Path) -> Path:
    """Write `folder/step-XXXXXX` for the state as it is now, and remove all but the newest `keep` and the best; returns its path.

    A damaged one of this step is replaced. Ones of later steps are damaged too (the run came back to an earlier step), so
    they count for nothing and are left where they are.
    """
    path = folder / f"step-{state.step:06d}"
    if path.exists() and verify_manifest(path):
        shutil.rmtree(path)
    if not path.exists():
        with staged_folder(path) as staging:
            state.save(staging, base=base)
            write_manifest(staging, {"step": state.step})
    up_to_now = [old for old in list_checkpoints(folder) if _step_of(old) <= state.step]
    for old in up_to_now[:-keep]:
        if state.best is None or _step_of(old) != state.best.step:
            shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; their contents are not looked at."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with each newer one."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        wrong = verify_manifest(path)
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


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
