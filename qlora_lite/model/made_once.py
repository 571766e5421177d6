"""Things of the cache that several processes may need before they are there: one process makes each, the others wait and use it.

    with making(folder):            waits while another process makes `folder`
        if not is_made(folder):     again, because it may be there now
            ...

The system holds the lock (filelock: flock on Unix) and gives it up when its process ends, however it ends: what a killed process leaves
behind blocks nobody. The lock is a file in `.locks` beside the folder and stays there. Where the place has no locks or cannot be written
to, nobody waits: each process makes the folder beside its place, the first rename wins, and `make_folder_once` takes what won.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from qlora_lite.errors import UserError
from qlora_lite.model.staging import make_folder, staged_folder


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside for the same `folder`; the others wait."""
    path = folder.parent / ".locks" / f"{folder.name}.lock"
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):  # whoever writes there says why that cannot be done
        make_folder(path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_folder_once(folder: Path, *, is_made: Callable[[], bool], make: Callable[[Path], None]) -> Path:
    """`folder`, from now on made by `make(staging)`; what is there and not `is_made` is replaced. Raises what `make` does, UserError."""
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
            if not is_made():  # else another process was faster, where there are no locks
                raise
    return folder
