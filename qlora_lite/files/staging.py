"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed.

A folder being written is locked by its writer. The lock dies with the process, so whoever writes the same folder next sees which of the
staging folders beside it were left by one that was killed, and removes these.
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
except ImportError:  # Windows: nothing is locked there, and nothing removed that could be somebody's
    fcntl = None  # type: ignore[assignment]


@contextmanager
def staged_folder(out: Path | str) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` in one rename when the block ends without an error.

    `out` must not exist or be an empty folder. Raises UserError otherwise, or when the place cannot be written to.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not an empty folder; name another folder, or remove it first")
    remove_left_over(out)
    try:
        make_folder(out.parent)
        staging, lock = new_staging(out)
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
        unlock(lock)


def publish_folder(staging: Path, out: Path) -> None:
    """Make the finished folder `staging` the folder `out`, durably and in one rename."""
    _sync_files(staging)
    staging.replace(out)
    fsync_folder(out.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably; nothing where it is there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_folder(made.parent)


def remove_left_over(out: Path) -> None:
    """Remove staging folders of `out` whose writers are gone."""
    if not out.parent.is_dir():
        return
    for staging in out.parent.iterdir():
        if staging.name.startswith(_prefix(out)) and staging.name.endswith(".staging"):
            lock = _try_lock(staging)
            if lock is not None:
                shutil.rmtree(staging, ignore_errors=True)
                unlock(lock)


def remove_folder(folder: Path) -> None:
    """Remove a finished folder so that a half-removed one is never taken for it: it loses its name first."""
    if not folder.exists():
        return
    gone = _staging_name(folder)
    folder.replace(gone)
    fsync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def short_name(name: str) -> str:
    """So much of a name that with what stands behind it, in a cache and while it is staged, it is still one (255 bytes)."""
    return os.fsencode(name)[:120].decode("utf-8", "ignore")


def write_text_durably(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old file or the whole new one, also after a power cut."""
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
            path.chmod(_usual_mode())  # safetensors creates files that only their owner may read
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)


def _usual_mode() -> int:
    """Of a new file, as the user's umask has it."""
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    return 0o666 & ~umask


def _staging_name(out: Path) -> Path:
    return out.with_name(f"{_prefix(out)}{uuid.uuid4().hex[:8]}.staging")


def _prefix(out: Path) -> str:
    """What staging folders of `out` begin with; a long name is not repeated, because names have at most 255 bytes."""
    name = os.fsencode(out.name)
    return f".{out.name}." if len(name) <= 200 else f".{hashlib.sha256(name).hexdigest()[:16]}."


def new_staging(out: Path) -> tuple[Path, int | None]:
    """A new folder and its lock. Until it is locked it looks left over, so whether it is still there is asked afterwards."""
    for _ in range(3):
        staging = _staging_name(out)
        staging.mkdir()
        lock = _try_lock(staging)
        if lock is not None and staging.exists():
            break
        unlock(lock)
        lock = None
    return staging, lock  # without a lock where the file system has none


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder that only one process may write to; again from inside is no harm. Yields False where another process has it."""
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
    """A descriptor that holds the folder's lock until it is closed, by us or by our end; None where another process has it."""
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
