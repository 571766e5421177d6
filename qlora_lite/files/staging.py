"""Atomic files and folders: written beside their final place, synced, then renamed.

The writer of a folder locks its staging folder. The lock ends with the process, so the next writer recognizes the staging folders left
by killed processes, and removes them.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lite.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no locks, and staging folders that may be in use are not removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `out`, and rename it to `out` when the block ends without an error.

    `out` must not exist or be an empty folder. Raises UserError otherwise, or when the place is not writable.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not an empty folder; give another folder, or remove it first")
    remove_left_over(out)
    try:
        make_folder(out.parent)
        staging, lock = new_staging(out)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot make a folder here ({error.strerror}); give another place") from error
    try:
        yield staging
        publish_folder(staging, out)
    except OSError as error:
        if error.errno is None or (error.filename is None and error.strerror is None):
            raise
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); free some space or give another place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        unlock(lock)


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def publish_folder(staging: Path, out: Path) -> None:
    """Rename the finished folder `staging` to `out`, durably."""
    _sync_files(staging)
    staging.replace(out)
    fsync_folder(out.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably; no-op if it exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def remove_left_over(out: Path) -> None:
    """Remove staging folders of `out` whose writers have ended."""
    if not out.parent.is_dir():
        return
    for staging in out.parent.iterdir():
        if staging.name.startswith(_prefix(out)) and staging.name.endswith(".staging"):
            lock = _try_lock(staging)
            if lock is not None:
                shutil.rmtree(staging, ignore_errors=True)
                unlock(lock)


def remove_folder(folder: Path) -> None:
    """Rename a finished folder, then remove it, so a half-removed folder never has the final name."""
    if not folder.exists():
        return
    renamed = _staging_name(folder)
    folder.replace(renamed)
    fsync_folder(folder.parent)
    shutil.rmtree(renamed, ignore_errors=True)


def short_name(name: str) -> str:
    """Shorten a name to leave room for the suffixes of the cache and of staging (a file name has at most 255 bytes)."""
    return os.fsencode(name)[:120].decode("utf-8", "ignore")


def write_text_durably(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old file or the complete new one, also after a power cut."""
    staging = path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")
    try:
        with staging.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a no-op where the system cannot open folders (Windows)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        elif path.is_file():
            path.chmod(_usual_mode())  # safetensors creates files that only their owner can read
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)


def _usual_mode() -> int:
    """Return the mode of a new file under the user's umask."""
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    return 0o666 & ~umask


def _staging_name(out: Path) -> Path:
    return out.with_name(f"{_prefix(out)}{uuid.uuid4().hex[:8]}.staging")


def _prefix(out: Path) -> str:
    """Return the prefix of staging folders of `out`: its name, or a hash of a long name, since names have at most 255 bytes."""
    name = os.fsencode(out.name)
    return f".{out.name}." if len(name) <= 200 else f".{hashlib.sha256(name).hexdigest()[:16]}."


def new_staging(out: Path) -> tuple[Path, int | None]:
    """Make a staging folder -> (folder, its lock). Another process may remove it before it is locked, so check it afterwards."""
    for _ in range(3):
        staging = _staging_name(out)
        staging.mkdir()
        lock = _try_lock(staging)
        if lock is not None and staging.exists():
            break
        unlock(lock)
        lock = None
    return staging, lock  # None on a file system without locks


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder for writing by one process; reentrant. Yields False when another process holds the lock."""
    key = os.path.realpath(folder)
    if key not in _HELD:
        descriptor = _try_lock(folder)
        if descriptor is None and fcntl is not None:
            yield False
            return
        _HELD[key] = [descriptor, 0]
    held = _HELD[key]
    held[1] += 1
    try:
        yield True
    finally:
        held[1] -= 1
        if held[1] == 0:
            del _HELD[key]
            unlock(held[0])


_HELD: dict[str, list[Any]] = {}  # real path -> [descriptor, number of blocks that hold it] of this process


def _try_lock(folder: Path) -> int | None:
    """Lock a folder -> a descriptor that holds the lock until it is closed or the process ends; None if another process has it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
