"""A folder that appears whole or not at all: written beside its place, synced, then renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lite.errors import UserError
from qlora_lite.model.safetensors_writer import fsync_folder


@contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` in one rename when the block ends without an error.

    `out` must not exist or be an empty folder. Raises UserError otherwise, or when the place cannot be written to.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not an empty folder; name another folder, or remove it first")
    staging = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.staging"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot make a folder here ({error.strerror}); name another place") from error
    try:
        yield staging
        publish_folder(staging, out)
    except OSError as error:
        if error.errno is None or (error.filename is None and error.strerror is None):
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror}); free some room or name another place") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, out: Path) -> None:
    """Make the finished folder `staging` the folder `out`, durably and in one rename."""
    _sync_files(staging)
    staging.replace(out)
    fsync_folder(out.parent)


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors creates files that only their owner may read
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)
