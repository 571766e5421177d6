"""Memory of the machine that holds the card: what a process may still take."""

from pathlib import Path

import psutil

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def host_memory() -> tuple[int, int]:
    """-> (free, all) bytes of the machine, or of the container that this process is confined to."""
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    for limit, used in _CGROUPS:
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
            most = int(limit.read_text())
            free, total = min(free, max(0, most - int(used.read_text()))), min(total, most)
    return free, total
