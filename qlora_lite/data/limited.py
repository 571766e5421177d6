"""Foreign code (a chat template) with a limit on its time and on the memory it takes.

A template can loop for ever (the sandbox limits each range, not the product of two) and make text of any length ("a" * 10**10). Neither
can be seen beforehand, nor from inside the sandbox without another template engine than transformers'. So the operating system counts:
processor time by ITIMER_PROF, which stands still while the machine sleeps or the process is stopped, and address space by RLIMIT_AS.
Both together take 3 microseconds, where the shortest rendering takes 100, so every rendering has them.

Signals reach the main thread only: in another thread, and where the system has neither (Windows, macOS), nothing is limited.
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
    """The function took more than it may; says of what."""


class _TimeIsUp(BaseException):
    """Passes by `except Exception` in the code that is stopped."""


class Limits:
    """`run` a function for at most `seconds` of processor time, while the process grows by at most `num_bytes`."""

    def __init__(self, *, seconds: float, num_bytes: int) -> None:
        self._seconds, self._num_bytes = seconds, num_bytes
        self._address_bytes = _address_bytes() if _IS_POSSIBLE else 0  # of the process, when it was last looked up

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns. Raises TooMuch, and whatever it raises."""
        if not _IS_POSSIBLE or threading.current_thread() is not threading.main_thread():
            return function()
        try:
            return self._run(function)
        except MemoryError:
            pass  # perhaps the process has grown since its size was looked up, which takes longer than all the rest
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
            )  # again and again: a destructor may swallow the first
            return function()
        except _TimeIsUp as error:
            raise TooMuch(f"more than {self._seconds:g} s of processor time") from error
        finally:
            _Alarm.is_set = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            if is_lower:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Alarm:
    """The one handler of SIGPROF. It stays installed, and passes on what it did not set."""

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
