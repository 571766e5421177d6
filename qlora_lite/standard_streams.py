"""Standard streams that fail: closed, on a full disk, a pipe without a reader, a terminal that has gone.

    stderr   takes messages: one that cannot be written is dropped, and the program continues. A run matters more than its messages.
    stdout   takes the result: a failed write raises `UserError`.
    stdin    is only read by `ask -`.

Inside `standard_streams()` this applies to all writes to `sys.stderr` and `sys.stdout`, including those of libraries.

Surprising:
- The next opened file would reuse a closed descriptor, and a library's message would go into a checkpoint: descriptors 0 to 2 are
  held open on the null device.
- Python flushes both streams at exit, and exits with code 120 if that fails: a failed stream is redirected to the null device.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qlora_lite.errors import UserError


@contextmanager
def standard_streams() -> Iterator[None]:
    """Guard the standard streams inside the block."""
    before = sys.stdin, sys.stdout, sys.stderr
    _hold_closed_descriptors()
    out, err = _Output(sys.stdout), _Messages(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.let_go()


def refuse_closed_stdin(verb: str) -> None:
    """Raise UserError when stdin is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(f"{verb}: stdin is closed. Give the question as an argument, or pipe questions in")


def refuse_closed_stdout() -> None:
    """Raise UserError, before long work, when stdout is closed."""
    if isinstance(sys.stdout, _Output) and sys.stdout.is_closed:
        raise UserError("--json: stdout is closed. Remove --json, or open stdout")


class _Guarded:
    """A stream, which may be None; forwards everything but writing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def is_closed(self) -> bool:
        return self._stream is None or bool(getattr(self._stream, "closed", False))

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and bool(self._stream.isatty())
        return False

    def write(self, text: str) -> int:
        if self.is_closed:
            self.fail("is closed")
            return len(text)
        try:
            return int(self._stream.write(text))
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:
            self.fail(f"cannot be written ({getattr(error, 'strerror', None) or error})")
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.is_closed:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.fail(f"cannot be written ({getattr(error, 'strerror', None) or error})")

    def fail(self, why: str) -> None:
        self._has_failed = True

    def let_go(self) -> None:
        """Redirect a failed stream to the null device, for Python's flush at exit."""
        with suppress(UserError):
            self.flush()
        if not self._has_failed or self.is_closed:
            return
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


class _Messages(_Guarded):
    def write(self, text: str) -> int:
        with suppress(RuntimeError):  # a signal's handler may write while a line is being written
            return super().write(text)
        return len(text)


class _Output(_Guarded):
    def fail(self, why: str) -> None:
        super().fail(why)
        raise UserError(f"stdout {why}: the result is not printed; files written by the command are complete")


def _hold_closed_descriptors() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)  # to itself if equal: child processes inherit it then
            if null != descriptor:
                os.close(null)
