"""Foreign code (a chat template) with a limit on its time and on the memory it takes.

A template can loop for ever (the sandbox limits each range, not the product of two) and make text of any length ("a" * 10**10). Neither
can be seen beforehand or from inside the sandbox without another template engine than transformers'. So the operating system counts:
processor time, which does not go on while the machine sleeps or the process is stopped, by ITIMER_VIRTUAL; and address space. Both are
system calls of a microsecond, so every rendering has them. Signals reach the main thread only: in another thread, and where the system
knows neither (Windows), nothing is limited.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_IS_POSSIBLE = hasattr(signal, "setitimer") and sys.platform == "linux"


class TooMuch(Exception):
    """The block took more than it may; says of what."""


class _TimeIsUp(BaseException):
    """Passes by `except Exception` in the code that is stopped."""


@contextmanager
def limited(*, seconds: float, num_bytes: int) -> Iterator[None]:
    """Raises TooMuch when the block takes more processor time, or more memory than the process has now and `num_bytes`."""
    if not _IS_POSSIBLE or threading.current_thread() is not threading.main_thread():
        yield
        return
    is_on = True

    def stop(number: int, frame: FrameType | None) -> None:
        if is_on:
            raise _TimeIsUp

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        try:
            signal.setitimer(
                signal.ITIMER_VIRTUAL, seconds, 0.1
            )  # again and again: a destructor swallows what it raises
            with _limited_memory(num_bytes):
                yield
        finally:
            is_on = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    except _TimeIsUp as error:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        raise TooMuch(f"more than {seconds:g} s of processor time") from error
    except MemoryError as error:
        raise TooMuch(f"more than {num_bytes:,} bytes of memory") from error


@contextmanager
def _limited_memory(num_bytes: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _address_bytes() + num_bytes
    if soft != resource.RLIM_INFINITY and soft <= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_bytes() -> int:
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(descriptor)
