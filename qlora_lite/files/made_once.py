"""Things of the cache that several processes may need before they are there: one process makes each, the others wait and use it.

    with making(folder):            waits while another process makes `folder`
        if not is_made(folder):     again, because it may be there now
            ...

The system holds the lock (filelock: flock on Unix) and gives it up when its process ends, however it ends: what a killed process leaves
behind blocks nobody. It is a file beside the folder, `.NAME.lock`, which goes away afterwards. Surprising: a process that waited for a
removed file and one that makes it again do not see each other. That costs no more than where no lock can be had: both make the folder
beside its place, the first rename wins, and `make_folder_once` takes what won. Who writes into the place itself keeps the file (`stays`).
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
    """Only one process at a time is inside for the same `folder`; the others wait."""
    path = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # whoever writes there says why that cannot be done
            make_folder(path.parent)
            held.enter_context(FileLock(path))
            if not stays:
                held.callback(_remove, path)
        yield


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows removes no open file
        path.unlink(missing_ok=True)


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
