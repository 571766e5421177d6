"""Cache folders that several processes need at once: one process makes each, the others wait and use it.

    with making(folder):            waits while another process makes `folder`
        if not is_made(folder):     checks again, because it may exist now
            ...

The operating system holds the lock (filelock: flock on Unix) and releases it when its process ends in any way, so a killed process
blocks nobody. The lock is a file beside the folder, `.NAME.lock`, removed afterwards. Surprising: a process that waited for a removed
lock file and one that creates it again do not exclude each other. The effect is the same as without a lock: both make the folder aside,
the first rename wins, and `make_folder_once` uses the winner's. Code that writes into the final place keeps the lock file (`stays`).
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from qlora_lite.errors import UserError
from qlora_lite.files.staging import make_folder, staged_folder


@contextmanager
def making(folder: Path, *, stays: bool = False) -> Iterator[None]:
    """Admit one process at a time per `folder`; the others wait."""
    path = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # the code that writes there reports the error
            make_folder(path.parent)
            held.enter_context(FileLock(path))
            if not stays:
                held.callback(_remove, path)
        yield


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows does not remove open files
        path.unlink(missing_ok=True)


def make_folder_once(folder: Path, *, is_made: Callable[[], bool], make: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `make(staging)` unless `is_made()`; replaces an incomplete one. Raises UserError and errors of `make`."""
    if is_made():
        return folder
    with making(folder):
        if is_made():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with staged_folder(folder) as staging:
                make(staging)
        except UserError:
            if not is_made():  # without locks, another process may have been faster
                raise
    return folder
