"""The machine that a process shares with others: memory that it may still take, and processor time that others take from it."""

import os
import time
from pathlib import Path

import psutil

from qlora_lite.device.waiting import BUSY_SHARE

_LEAST_S = 0.2  # processor time is counted in hundredths of a second
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


class OtherWork:
    """How many cores the rest of the machine kept busy since the last look: other processes, other users, other virtual machines."""

    def __init__(self) -> None:
        self._before = self._now()

    def cores(self) -> float:
        """On average since the last call, or since this was made; 0.0 for less than the clock of the system can tell."""
        before, self._before = self._before, self._now()
        elapsed_s = self._before[2] - before[2]
        if elapsed_s < _LEAST_S:
            return 0.0
        others_s = (self._before[0] - before[0]) - (self._before[1] - before[1])
        return min(max(others_s / elapsed_s, 0.0), float(os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """-> (processor seconds of the whole machine, of this process, by the clock)."""
        times = psutil.cpu_times()
        all_s = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return all_s, time.process_time(), time.monotonic()


def in_words(other_cores: float) -> str | None:
    """A remark on a busy machine; None for a quiet one."""
    num_cores = os.cpu_count() or 1
    if other_cores < BUSY_SHARE * num_cores:
        return None
    return f"other programs take {other_cores:.1f} of {num_cores} cores"
