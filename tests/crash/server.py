"""A process that has imported everything, and forks a child for every `qlora-lite` command it is asked for.

Importing takes seconds, a run of the tiny model hardly more: so hundreds of runs can be killed. Each child is a process of its own with
an empty past: the server itself has computed nothing, started no thread and opened no run. In: one JSON document a line (`Job`), out: one
(`Outcome`). The children's output goes to files. A child that is asked to leaves its plan's rehearsals behind, more than half of a tiny
run's time; the server reads them, and later children need not rehearse the same again.
"""

import importlib
import json
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.crash.faults import Fault, Faults, install

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `signal` is the one that ended it, `points` the write points it came by."""

    code: int | None
    signal: int | None
    elapsed_s: float
    stdout: str
    stderr: str
    points: list[str] = field(default_factory=list)

    @property
    def was_killed(self) -> bool:
        return self.signal == signal.SIGKILL


class Server:
    """A context manager; `run` gives a command to a new child and waits for its end."""

    def __init__(self, scratch: Path, *, home: Path, limit_s: float = 120) -> None:
        self.scratch, self.limit_s = scratch, limit_s
        self.environment = os.environ | {
            "QLORA_LITE_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def __enter__(self) -> "Server":
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env=self.environment,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self.process:  # closes its pipes: without input it ends
            pass

    def run(
        self,
        *words: object,
        fault: Fault | None = None,
        roots: list[Path] | None = None,
        kill_after_s: float | None = None,
        signal_after_s: tuple[float, int] | None = None,
        limits: dict[str, int] | None = None,
        environment: dict[str, str] | None = None,
        leaves_rehearsals: bool = False,
    ) -> Outcome:
        """`qlora-lite WORDS`; `roots` are the folders whose write points count. `limits` are resource limits by name."""
        job = {
            "words": [str(word) for word in words],
            "fault": asdict(fault or Fault()),
            "roots": [str(root) for root in roots or []],
            "scratch": str(self.scratch),
            "kill_after_s": kill_after_s,
            "signal_after_s": signal_after_s,
            "limit_s": self.limit_s,
            "limits": limits or {},
            "environment": environment or {},
            "leaves_rehearsals": leaves_rehearsals,
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server of forked commands has ended"
        return Outcome(**json.loads(line))


def serve() -> None:
    """Import everything that a command would, then fork one after the other."""
    import datasets  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from qlora_lite import commands
    from qlora_lite.base.bnb import bitsandbytes  # noqa: F401

    for module in pkgutil.iter_modules(commands.__path__, "qlora_lite.commands."):
        importlib.import_module(module.name)
    get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions the first time
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    for line in sys.stdin:
        out.write(json.dumps(asdict(_run(json.loads(line)))) + "\n")
        out.flush()


def _run(job: dict[str, Any]) -> Outcome:
    scratch = Path(job["scratch"])
    files = {name: scratch / name for name in ("stdout", "stderr", "points")}
    for path in files.values():
        path.write_text("")
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(job, files)
    code = _wait(child, begin, job)
    if job["leaves_rehearsals"] and code == 0:
        for known, found in zip(_rehearsals(), pickle.loads((scratch / "rehearsals").read_bytes()), strict=True):
            known.update(found)
    text = {name: path.read_text(errors="replace") for name, path in files.items()}
    ended_by = -code if code < 0 else None
    return Outcome(
        code=None if ended_by else code,
        signal=ended_by,
        elapsed_s=time.monotonic() - begin,
        stdout=text["stdout"],
        stderr=text["stderr"],
        points=text["points"].splitlines(),
    )


def _rehearsals() -> tuple[dict[Any, Any], ...]:
    """What this process knows of memory: numbers that depend on the model's config and the settings alone."""
    from qlora_lite.plan import compare

    return compare._known, compare._known_shallow, compare._known_evaluations


def _wait(child: int, begin: float, job: dict[str, Any]) -> int:
    """The child's exit code (negative: a signal's number), after the signals that it is to get."""
    to_send = [(job["limit_s"], signal.SIGABRT)]
    to_send += [(job["kill_after_s"], signal.SIGKILL)] if job["kill_after_s"] is not None else []
    to_send += [tuple(job["signal_after_s"])] if job["signal_after_s"] is not None else []
    to_send.sort(reverse=True)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if to_send and time.monotonic() - begin >= to_send[-1][0]:
            os.kill(child, to_send.pop()[1])
        time.sleep(0.002)


def _become(job: dict[str, Any], files: dict[str, Path]) -> None:
    """In the child: its own output, environment, limits and faults; then the command. Does not return."""
    import resource

    from qlora_lite.cli import main

    os.environ.update(job["environment"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(files[name], os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install(Faults(Fault(**job["fault"]), [Path(root) for root in job["roots"]], files["points"]))
    code = 1
    try:
        main(job["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if job["leaves_rehearsals"]:
            (Path(job["scratch"]) / "rehearsals").write_bytes(pickle.dumps(_rehearsals()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
