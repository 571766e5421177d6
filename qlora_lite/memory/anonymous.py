"""Anonymous host memory of a stage: memory that the process must really have, without memory-mapped files."""

import threading
from pathlib import Path
from types import TracebackType

_SAMPLE_S = 0.005


class HostMemoryMeter:
    """Context manager; `peak_bytes` is the highest RssAnon sampled inside, above the value on entry.

    Samples /proc/self/status every 5 ms in a thread. None outside Linux, where it does not exist.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "HostMemoryMeter":
        self._start = _anonymous_bytes()
        if self._start is not None:
            self.peak_bytes = 0
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._start is not None:
            self._thread.join()

    def _sample(self) -> None:
        while True:
            now = _anonymous_bytes()
            if now is not None and self._start is not None and self.peak_bytes is not None:
                self.peak_bytes = max(self.peak_bytes, now - self._start)
            if self._stop.wait(_SAMPLE_S):
                return


def _anonymous_bytes() -> int | None:
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the meter stays None
    return None
