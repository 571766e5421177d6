"""Verify a run: compare every file with the hash recorded when it was written.

In: a run's folder, or any folder with a manifest (a merged model elsewhere, a copied adapter). Out: one `Checked` per file.
Files of trackers and of the profiler, in trackers/ and profile/, are not checked.
"""

from collections.abc import Iterator
from pathlib import Path

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import MANIFEST_NAME, Checked, check_folder
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.records import check_records
from qlora_lite.training.checkpoint import list_checkpoints


def verify_folder(folder: Path) -> Iterator[Checked]:
    """Yield every file as it is checked. Raises RunError for a folder that is not a run and has no manifest."""
    run = RunDir(folder)
    if not run.has_begun:
        if not (folder / MANIFEST_NAME).exists():
            raise RunError(f"{folder}: neither a run nor a folder with a {MANIFEST_NAME}, so no file can be checked")
        yield from check_folder(folder)
        return
    yield from check_records(run.path)
    for part in (*list_checkpoints(run.checkpoints), run.adapter, run.weights, run.merged):
        if part.is_dir() and part != run.path:
            name = part.relative_to(run.path).as_posix()
            yield from (Checked(f"{name}/{file.path}", file.why) for file in check_folder(part))
    for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else ():
        if path not in list_checkpoints(run.checkpoints) and not path.name.startswith("."):
            yield Checked(
                path.relative_to(run.path).as_posix(),
                "not a checkpoint: it was put here by something else",
                is_extra=True,
            )


def refuse_damaged(folder: Path) -> None:
    """Raise RunError if a listed file of a folder with a manifest has changed; added files are allowed."""
    files = check_records(folder) if RunDir(folder).has_begun else check_folder(folder)
    damaged = [file for file in files if not file.ok and not file.is_extra]
    if damaged:
        raise RunError(f"{folder / damaged[0].path}: {damaged[0].why}. Restore the folder, or create it again")
