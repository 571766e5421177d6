"""A folder for hundreds of small runs, in memory where the system has room for it: there, writing durably takes no time.

A process that is killed loses nothing of what it wrote, in memory or on a disk, so tests of kills see the same.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")
_ENOUGH = 2 * 2**30  # bytes


@contextmanager
def quick_folder(name: str) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    has_room = _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free >= _ENOUGH
    with tempfile.TemporaryDirectory(
        prefix=f"qlora-lite-{name}-", dir=_IN_MEMORY if has_room else None, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
