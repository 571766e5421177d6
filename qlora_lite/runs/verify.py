"""Is everything of a run as it was written? Every file against the hash that was noted when it was written.

In: a run's folder, or any folder with a manifest (a merged model elsewhere, an adapter that was copied). Out: one `Checked` a file.
What trackers and the profiler wrote in trackers/ and profile/ is theirs and is not looked at.
"""

from collections.abc import Iterator
from pathlib import Path

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import MANIFEST_NAME, Checked, check_folder
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.records import check_records
from qlora_lite.training.checkpoint import list_checkpoints


def verify_folder(folder: Path) -> Iterator[Checked]:
    """Every file, as it is checked. Raises RunError for a folder that is no run and has no manifest."""
    run = RunDir(folder)
    if not run.has_begun:
        if not (folder / MANIFEST_NAME).exists():
            raise RunError(
                f"{folder}: neither a run nor a folder with a {MANIFEST_NAME}, so there is nothing to hold it against"
            )
        yield from check_folder(folder)
        return
    yield from check_records(run.path)
    for part in (*list_checkpoints(run.checkpoints), run.adapter, run.weights, run.merged):
        if part.is_dir() and part != run.path:
            name = part.relative_to(run.path).as_posix()
            yield from (Checked(f"{name}/{each.path}", each.why) for each in check_folder(part))
    for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else ():
        if path not in list_checkpoints(run.checkpoints) and not path.name.startswith("."):
            yield Checked(
                path.relative_to(run.path).as_posix(), "no checkpoint: it was put here by something else", is_extra=True
            )


def refuse_damaged(folder: Path) -> None:
    """Raise RunError when a folder with a manifest is not as it was written; files that were added do no harm."""
    found = check_records(folder) if RunDir(folder).has_begun else check_folder(folder)
    damaged = [each for each in found if not each.ok and not each.is_extra]
    if damaged:
        raise RunError(f"{folder / damaged[0].path}: {damaged[0].why}. Put the folder back as it was, or make it anew")
