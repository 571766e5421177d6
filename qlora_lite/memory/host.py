"""The machine around this process: free memory, and processor time of other programs."""

import os
import time
from pathlib import Path

import psutil

from qlora_lite.device.waiting import BUSY_SHARE

_LEAST_S = 0.2  # processor time has a resolution of hundredths of a second
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def host_memory() -> tuple[int, int]:
    """-> (free, total) bytes of the machine, or of the container of this process."""
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    for limit, used in _CGROUPS:
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
            limit_bytes = int(limit.read_text())
            free, total = min(free, max(0, limit_bytes - int(used.read_text()))), min(total, limit_bytes)
    return free, total


class OtherWork:
    """Cores that the rest of the machine kept busy since the last call: other processes, users and virtual machines."""

    def __init__(self) -> None:
        self._before = self._now()

    def cores(self) -> float:
        """Mean number of cores since the last call or the creation; 0.0 for an interval below the clock's resolution."""
        before, self._before = self._before, self._now()
        elapsed_s = self._before[2] - before[2]
        if elapsed_s < _LEAST_S:
            return 0.0
        other_s = (self._before[0] - before[0]) - (self._before[1] - before[1])
        return min(max(other_s / elapsed_s, 0.0), float(os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """-> (processor seconds of the whole machine, of this process, clock seconds)."""
        times = psutil.cpu_times()
        all_s = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return all_s, time.process_time(), time.monotonic()


def in_words(other_cores: float) -> str | None:
    """A remark about a busy machine; None for a quiet one."""
    num_cores = os.cpu_count() or 1
    if other_cores < BUSY_SHARE * num_cores:
        return None
    return f"other programs take {other_cores:.1f} of {num_cores} cores"
