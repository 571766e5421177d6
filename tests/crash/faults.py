"""Faults at the places where a program writes: installed in a process that is about to run `qlora-lite`, from outside of its code.

A *write point* is a call that changes what lies on the disk below one of `roots`: open for writing, write, sync, rename, mkdir, remove,
link, truncate, chmod, and the lock. They are numbered in the order in which they come, and each is written down in a log before it is
done, so that a test can first see which there are and then break one. In: a `Fault`. Out: the log, and what the fault does:

    kill       half of what would have been written is, and the process is gone (SIGKILL)
    error      the call fails with `errno` (ENOSPC, EIO), and so do the `count - 1` write points after it
    short      a raw write takes one byte only, as the system may
    read_only  every write point from here on fails with EROFS
    clock      the wall clock jumps by `seconds`, and again back at the next write point
    signal     the process gets signal `number`, and so it does at the `count - 1` write points after it

Not seen: what libraries write without Python (Arrow files of tokenized rows, the tokenizer's own file).
"""

import builtins
import errno
import fcntl
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which write point (1 is the first); `at` 0 only watches."""

    kind: str = "watch"
    at: int = 0
    count: int = 1
    errno: int = errno.ENOSPC
    seconds: float = 1e6
    number: int = signal.SIGTERM


class Faults:
    """Counts write points below `roots`, and breaks the one that the fault is about."""

    def __init__(self, fault: Fault, roots: list[Path], log: Path) -> None:
        self.fault, self.number, self.clock = fault, 0, 0.0
        self.roots = [os.path.realpath(root) for root in roots]
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.real = {name: getattr(os, name) for name in ("write", "kill")}

    def point(self, what: str, path: Any) -> str | None:
        """Note a write point; -> what to do there, None for nothing. Raises OSError where it is to fail."""
        found = self._below(path)
        if found is None:
            return None
        self.number += 1
        self.real["write"](self.log, f"{self.number} {what} {found}\n".encode())
        fault, since = self.fault, self.number - self.fault.at
        if fault.at == 0 or since < 0:
            return None
        if fault.kind == "signal" and since < fault.count:
            self.real["kill"](os.getpid(), fault.number)
        if fault.kind == "clock":
            self.clock = fault.seconds if since % 2 == 0 else -fault.seconds
        failing = fault.kind == "read_only" or (fault.kind == "error" and since < fault.count)
        if failing and what not in ("remove", "lock"):
            code = errno.EROFS if fault.kind == "read_only" else fault.errno
            raise OSError(code, os.strerror(code), str(path))
        return fault.kind if since == 0 else None

    def die(self) -> None:
        self.real["kill"](os.getpid(), signal.SIGKILL)

    def _below(self, path: Any) -> str | None:
        try:
            path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        except (OSError, TypeError):
            return None
        path = os.path.join(
            os.path.realpath(os.path.dirname(os.fsdecode(path)) or "."), os.path.basename(os.fsdecode(path))
        )
        for root in self.roots:
            if path == root or path.startswith(root + os.sep):
                return os.path.relpath(path, os.path.dirname(root))
        return None


class _File:
    """An open file whose writes are write points."""

    def __init__(self, file: Any, faults: Faults, path: Any) -> None:
        self._file, self._faults, self._path = file, faults, path

    def write(self, data: Any) -> Any:
        action = self._faults.point("write", self._path)
        if action == "kill":
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faults.die()
        if action == "short" and isinstance(self._file, io.RawIOBase):
            return self._file.write(data[:1])
        return self._file.write(data)

    def truncate(self, *size: int) -> Any:
        if self._faults.point("truncate", self._path) == "kill":
            self._faults.die()
        return self._file.truncate(*size)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def install(faults: Faults) -> None:
    """From here on every write point of this process goes through `faults`."""
    real_open = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        is_writing = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        if not is_writing or faults._below(file) is None:
            return real_open(file, mode, *rest, **options)
        if faults.point("open", file) == "kill":
            faults.die()
        return _File(real_open(file, mode, *rest, **options), faults, file)

    builtins.open = io.open = opened  # type: ignore[assignment]
    for what, names in {
        "sync": ("fsync",), "rename": ("replace", "rename"), "make": ("mkdir",), "remove": ("unlink", "remove", "rmdir"),
        "link": ("link", "symlink"), "truncate": ("truncate",), "chmod": ("chmod",),
    }.items():  # fmt: skip
        for name in names:
            setattr(os, name, _watched(faults, what, getattr(os, name), by_target=what in ("rename", "link")))
    fcntl.flock = _watched(faults, "lock", fcntl.flock, by_target=False)  # type: ignore[assignment]
    real_time = time.time
    time.time = lambda: real_time() + faults.clock  # type: ignore[assignment]
    _watch_safetensors(faults)


def _watched(faults: Faults, what: str, real: Callable[..., Any], *, by_target: bool) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        path = arguments[1] if by_target else arguments[0]
        if isinstance(options.get("dir_fd"), int):
            path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), os.fspath(path))
        if faults.point(what, path) == "kill":
            faults.die()
        return real(*arguments, **options)

    return call


def _watch_safetensors(faults: Faults) -> None:
    """`save_file` writes without Python: killed in the middle it leaves half a file."""
    import safetensors.torch

    real = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, path: Any, *rest: Any, **options: Any) -> Any:
        try:
            action = faults.point("write", path)
        except OSError as error:
            raise safetensors.SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
        found = real(tensors, path, *rest, **options)
        if action == "kill":
            os.truncate(path, os.path.getsize(path) // 2)
            faults.die()
        return found

    safetensors.torch.serialize_file = serialize_file
