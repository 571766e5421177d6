"""How long a thread spins at the end of a shared product before it sleeps; chosen before torch loads its OpenMP, and step by step.

GNU's OpenMP (libgomp, in torch's builds for Linux) lets a waiting thread spin 300,000 turns, about ten milliseconds, before it sleeps.
On a quiet machine this costs nothing. Next to other programs, the spinning thread takes the processor from the very thread it waits for:
on two cores, a step took six times as long next to two busy loops. A thread that sleeps at once pays for each wake-up, in every product
of a quiet run. So the number of turns depends on the load when the program starts (figures: tools/bench_busy). Results do not depend on it.

The load may change later, and libgomp reads its settings only once. But it spins for 100 turns only while it manages more threads than
there are processors (gomp_throttled_spin_count_var in its config/linux/wait.h). `ShortWaits` makes it so while other programs run: a thread
that sleeps keeps a team of its own.
"""

import os
import threading
from collections.abc import Callable, MutableMapping
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


class ShortWaits:
    """Context manager: short waits while other programs take processors, long ones while they do not.

    `work_in_parallel` runs any product large enough to be shared among threads.
    """

    def __init__(self, work_in_parallel: Callable[[], object]) -> None:
        self._work = work_in_parallel
        self._end: threading.Event | None = None  # of the thread that keeps a team; None: no such thread
        self._thread: threading.Thread | None = None
        self._is_users_choice = "OMP_WAIT_POLICY" in os.environ

    def __enter__(self) -> "ShortWaits":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def follow(self, other_cores: float) -> None:
        """Choose by the number of cores that other programs used lately."""
        is_busy = other_cores >= BUSY_SHARE * (os.cpu_count() or 1) and not self._is_users_choice
        if is_busy and self._end is None:
            self._begin()
        elif not is_busy:
            self.stop()

    def stop(self) -> None:
        """Return to long waits."""
        if self._end is not None and self._thread is not None:
            self._end.set()
            self._thread.join()
            self._end = self._thread = None

    def _begin(self) -> None:
        end, has_team = threading.Event(), threading.Event()

        def keep_a_team() -> None:
            self._work()
            has_team.set()
            end.wait()

        self._end, self._thread = end, threading.Thread(target=keep_a_team, daemon=True)
        self._thread.start()
        has_team.wait()


def num_others_running(load: Path) -> int:
    """Threads of the whole machine that run or wait for a processor now, without this one; 0 where unknown."""
    try:
        running, _, _ = load.read_text(encoding="ascii").split()[3].partition("/")
        return max(0, int(running) - 1)
    except (OSError, ValueError, IndexError):
        return 0
