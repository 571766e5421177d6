"""Time and memory limits for foreign code (chat templates).

A template can loop forever (the sandbox limits each range, not the product of two) and make text of any length ("a" * 10**10). Neither
is predictable, nor detectable inside the sandbox without replacing transformers' template engine. So the operating system sets limits:
processor time by ITIMER_PROF, which pauses while the machine sleeps or the process is stopped, and address space by RLIMIT_AS.
Both take 3 microseconds, the shortest rendering 100, so every rendering is limited.

Signals reach only the main thread: other threads, and systems without these limits (Windows, macOS), are not limited.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_IS_POSSIBLE = sys.platform == "linux"


class TooMuch(Exception):
    """A function exceeded a limit; the message names the limit."""


class _TimeIsUp(BaseException):
    """Raised in the interrupted code; not caught by `except Exception`."""


class Limits:
    """Limits on `run`: at most `seconds` of processor time, and at most `num_bytes` of growth of the process."""

    def __init__(self, *, seconds: float, num_bytes: int) -> None:
        self._seconds, self._num_bytes = seconds, num_bytes
        self._address_bytes = _address_bytes() if _IS_POSSIBLE else 0  # of the process, at the last measurement

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` and return its result. Raises TooMuch, and any error of `function`."""
        if not _IS_POSSIBLE or threading.current_thread() is not threading.main_thread():
            return function()
        try:
            return self._run(function)
        except MemoryError:
            pass  # the process may have grown since its size was measured, which is too slow to do each time
        self._address_bytes = _address_bytes()
        try:
            return self._run(function)
        except MemoryError as error:
            raise TooMuch(f"more than {self._num_bytes:,} bytes of memory") from error

    def _run(self, function: Callable[[], T]) -> T:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = self._address_bytes + self._num_bytes
        is_lower = soft == resource.RLIM_INFINITY or wanted < soft
        if not _Alarm.is_installed:
            _Alarm.install()
        try:
            if is_lower:
                resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
            _Alarm.is_set = True
            signal.setitimer(
                signal.ITIMER_PROF, self._seconds, 0.1
            )  # repeated: a destructor may swallow the first signal
            return function()
        except _TimeIsUp as error:
            raise TooMuch(f"more than {self._seconds:g} s of processor time") from error
        finally:
            _Alarm.is_set = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            if is_lower:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Alarm:
    """The only handler of SIGPROF. It stays installed, and forwards signals of other timers."""

    is_installed = is_set = False
    before: Any = None

    @classmethod
    def install(cls) -> None:
        cls.before = signal.signal(signal.SIGPROF, cls.ring)
        cls.is_installed = True

    @classmethod
    def ring(cls, number: int, frame: FrameType | None) -> None:
        if cls.is_set:
            raise _TimeIsUp
        if callable(cls.before):
            cls.before(number, frame)


def _address_bytes() -> int:
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(descriptor)
