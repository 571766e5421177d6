"""How long a thread spins at the end of a shared product before it sleeps; chosen before torch loads its OpenMP.

GNU's OpenMP (libgomp, in torch's builds for Linux) lets a waiting thread spin 300,000 turns, about ten milliseconds, before it sleeps.
On a quiet machine this costs nothing. Next to other programs, the spinning thread takes the processor from the very thread it waits for:
on two cores, a step took six times as long next to two busy loops. A thread that sleeps at once pays for each wake-up, in every product
of a quiet run. So the number of turns depends on the load when the program starts (figures: tools/bench_busy). Results do not depend on it.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

BUSY_SHARE = 0.25  # of the cores: with more used by other programs, times of a run are unreliable
TURNS_QUIET = 30_000
TURNS_BUSY = 5_000
_LOAD = Path("/proc/loadavg")


def choose_spinning(environment: MutableMapping[str, str]) -> None:
    """Set GOMP_SPINCOUNT in `environment`, unless the user has set how threads wait. No effect once torch is loaded."""
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return
    is_busy = num_others_running(_LOAD) >= BUSY_SHARE * (os.cpu_count() or 1)
    environment["GOMP_SPINCOUNT"] = str(TURNS_BUSY if is_busy else TURNS_QUIET)


def num_others_running(load: Path) -> int:
    """Threads of the whole machine that run or wait for a processor now, without this one; 0 where unknown."""
    try:
        running, _, _ = load.read_text(encoding="ascii").split()[3].partition("/")
        return max(0, int(running) - 1)
    except (OSError, ValueError, IndexError):
        return 0
