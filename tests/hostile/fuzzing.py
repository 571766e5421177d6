"""Run a reader on mutated inputs in a forked process, and say what became of each.

    in    a `Reader`, the numbers of its cases: case n is drawn from Random(f"{reader}:{n}"), so it is the same for ever
    out   an `Outcome` a case: ok, refused (exit code 2), or one of FAILURES

The process has a folder of its own as current folder, home, cache and TMPDIR. It is watched from outside: a case that does not end is
killed with it, and the next case begins in a new process. What it may not do is seen by an audit hook (opening a file elsewhere for
writing, anything in `outside/` for reading, starting programs, connecting) and by the two limits on memory.

Surprising: the parent never runs a reader or makes a seed, because libraries start threads, which a forked process would not have.
"""

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from qlora_lite.errors import QloraLiteError
from tests.hostile import model_readers, run_readers, text_readers
from tests.hostile.reader import Reader

READERS = {reader.name: reader for module in (text_readers, model_readers, run_readers) for reader in module.READERS}
FAILURES = ("crash", "died", "hang", "memory", "outside", "wordless")
CASE_SECONDS = 60.0  # a chat template may take 5 s of processor time by itself, on a busy machine some times that
GROWTH_BYTES = 768 * 2**20  # of a process's resident size, by one case
ADDRESS_BYTES = 6 * 2**30  # of address space, above what the process has before its first case
FILE_BYTES = 2**28
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_CHANGING = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")


@dataclass(frozen=True)
class Outcome:
    """What became of one case. `detail` says how a failure looked."""

    case: int
    what: str
    parsed: bool
    seconds: float
    detail: str = ""


def run_cases(
    reader: Reader, cases: Sequence[int], *, case_seconds: float = CASE_SECONDS, first_seconds: float = 120
) -> Iterator[Outcome]:
    """The outcome of each case in order; negative numbers are the seeds as they are, -1 the first.

    A process's first case has more time, `first_seconds`, because its seeds are made before it.
    """
    waiting = list(cases)
    while waiting:
        for outcome in _one_process(reader, list(waiting), case_seconds, first_seconds):
            waiting.remove(outcome.case)
            yield outcome


def show_case(reader: Reader, case: int, folder: Path) -> None:
    """Write the input of one case into `folder`, to look at."""
    seeds = folder / "seeds"
    seeds.mkdir(parents=True)
    (folder / "input").mkdir()
    _write(reader, reader.make(seeds), case, folder / "input")


def _one_process(reader: Reader, cases: list[int], case_seconds: float, first_seconds: float) -> Iterator[Outcome]:
    """Outcomes until the cases are done or one of them ends the process."""
    root = Path(tempfile.mkdtemp(prefix="qlora-lite-fuzz-"))
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        try:
            _work(reader, cases, root, sending)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(0)
    os.close(sending)
    done, begun, rest = 0, time.monotonic(), b""
    try:
        while done < len(cases):
            limit = case_seconds if done else first_seconds
            left = begun + limit - time.monotonic()
            ready = left > 0 and select.select([receiving], [], [], left)[0]
            if not ready:
                yield Outcome(cases[done], "hang", parsed=True, seconds=limit, detail=f"no end after {limit:g} s")
                return
            received = os.read(receiving, 2**16)
            if not received:
                _, status = os.waitpid(child, 0)
                child = 0
                log = (root / "log").read_text(encoding="utf-8", errors="replace")[-2000:]
                assert status != 0, f"{reader.name}: the fuzzer failed:\n{log}"  # not what it tests
                yield Outcome(cases[done], "died", parsed=True, seconds=0, detail=f"status {status}: {log}")
                return
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                yield Outcome(**json.loads(line))
                done, begun = done + 1, time.monotonic()
    finally:
        os.close(receiving)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        shutil.rmtree(root, ignore_errors=True)


def _work(reader: Reader, cases: list[int], root: Path, sending: int) -> None:
    log = os.open(root / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    for name in ("home", "tmp", "seeds", "outside", "here"):
        (root / name).mkdir()
    save_file({"secret": torch.ones(1)}, root / "outside" / "secret.safetensors")
    os.environ |= {"HOME": str(root / "home"), "QLORA_LITE_HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
    tempfile.tempdir = str(root / "tmp")
    os.chdir(root / "here")
    seeds = reader.make(root / "seeds")
    watch = _Watch(root)
    _limit_memory()
    for number, case in enumerate(cases):
        folder = root / f"case-{number}"
        folder.mkdir()
        outcome = _run_case(reader, seeds, case, folder, watch)
        shutil.rmtree(folder, ignore_errors=True)
        os.write(sending, json.dumps(asdict(outcome)).encode() + b"\n")


def _write(reader: Reader, seeds: list[Any], case: int, folder: Path) -> None:
    if case < 0:
        reader.write(seeds[(-1 - case) % len(seeds)], folder, None)
        return
    rng = Random(f"{reader.name}:{case}")
    reader.write(rng.choice(seeds), folder, rng)


def _run_case(reader: Reader, seeds: list[Any], case: int, folder: Path, watch: "_Watch") -> Outcome:
    _write(reader, seeds, case, folder)
    try:
        parsed = bool(reader.parses(folder))
    except Exception:
        parsed = False
    resident, begun = _resident_bytes("VmRSS", reset=True), time.monotonic()
    what, detail = "ok", ""
    with watch:
        try:
            reader.read(folder)
        except QloraLiteError as error:
            what, detail = (
                ("refused", "") if error.exit_code == 2 else ("crash", f"exit code {error.exit_code}: {error}")
            )
            if what == "refused" and len(str(error)) < 15:
                what, detail = "wordless", str(error)
        except MemoryError:
            what, detail = "memory", traceback.format_exc()[-1500:]
        except BaseException as error:
            what, detail = "crash", f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-2500:]}"
    seconds = time.monotonic() - begun
    grown = _resident_bytes("VmHWM") - resident
    if watch.seen:
        what, detail = "outside", "; ".join(watch.seen)
    elif grown > GROWTH_BYTES and what in ("ok", "refused"):
        what, detail = "memory", f"{grown / 2**20:.0f} MiB more"
    return Outcome(case, what, parsed, round(seconds, 3), detail)


class _Watch:
    """Inside the block, notes what is opened or changed where nothing should be."""

    def __init__(self, root: Path) -> None:
        self.root, self.outside = os.fspath(root) + "/", os.fspath(root / "outside") + "/"
        self.seen: list[str] = []
        self._is_on = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self.seen, self._is_on = [], True

    def __exit__(self, *_: object) -> None:
        self._is_on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & _WRITING) or any(letter in str(arguments[1] or "") for letter in "wax+")
            if path.startswith(self.outside) or (writes and not path.startswith((self.root, "/dev/"))):
                self.seen.append(f"{'writes' if writes else 'reads'} {path}")
        elif event in _CHANGING:
            paths = [
                os.path.realpath(os.fsdecode(one)) for one in arguments if isinstance(one, str | bytes | os.PathLike)
            ]
            self.seen += [f"{event} {path}" for path in paths[-1:] if not path.startswith(self.root)]
        elif event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments[:1]!r}")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    address = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address, address))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident_bytes(what: str, *, reset: bool = False) -> int:
    """VmRSS is what is resident now, VmHWM the most since the last `reset` (Linux: proc(5), clear_refs)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{what}:"))
