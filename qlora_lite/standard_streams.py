"""Standard input, output and error as machines have them: closed, on a full disk, a pipe that nobody reads, a terminal that is gone.

    stderr   is for messages: one that cannot be written is dropped, and the program goes on. A run is worth more than its messages.
    stdout   is for the result: where it cannot be written, `UserError` says so.
    stdin    is only read by `ask -`.

Inside `standard_streams()` this holds for everything that writes to `sys.stderr` and `sys.stdout`, libraries too.

Surprising:
- A descriptor that is closed would be given to the next file that is opened, so that a library's message would be written into a
  checkpoint: descriptors 0 to 2 are held open on the null device.
- Python flushes both streams once more when it ends, and ends with code 120 where that fails: a stream that has failed is then pointed at
  the null device too.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from qlora_lite.errors import UserError


@contextmanager
def standard_streams() -> Iterator[None]:
    """Guard them inside the block."""
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
    """Raise UserError where there is nothing to read from."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(
            f"{verb}: stdin is closed, so no question can be read from it. Give the question as a word, or pipe some in"
        )


def refuse_closed_stdout() -> None:
    """Raise UserError, before long work, where its result could be written nowhere."""
    if isinstance(sys.stdout, _Output) and sys.stdout.is_closed:
        raise UserError(
            "--json: stdout is closed, so the document could be written nowhere. Leave --json out, or open stdout"
        )


class _Guarded:
    """A stream, which may be None; everything but writing is its own."""

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
        """What could not be written goes nowhere, also when Python tries once more at its end."""
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
        raise UserError(f"stdout {why}, so the result is not printed; files that the command wrote are whole")


def _hold_closed_descriptors() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)  # to itself where it is the same: then children have it too
            if null != descriptor:
                os.close(null)
