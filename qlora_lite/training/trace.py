"""Record a timeline of a few steps with torch's profiler.

    out   FOLDER/step-000002.json.gz   every operator of the step's last micro-batch and of its update, by time, with the calling
                                       layer; ui.perfetto.dev and chrome://tracing open it, nothing is sent anywhere
          FOLDER/step-000002.pickle    on CUDA: every allocation with its place in the program, for the memory viewer at
                                       docs.pytorch.org/memory_viz. The format is torch's; this program never reads it

The first step includes one-time work, so recording begins with the second step of a session. torch runs one profiler at a time: on the
CPU, steps whose allocations are measured are skipped. A recorded step is slower, by microseconds per operator.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from torch.profiler import profile, supported_activities

from qlora_lite.device.accelerator import is_accelerator, torch_module

NUM_STEPS = 2
_MAX_ALLOCATIONS = 200_000  # in the memory viewer's file
Context = AbstractContextManager[object]


class Trace:
    """Records into `folder`; `files` are the files written so far."""

    def __init__(self, folder: Path, *, device: str, num_steps: int = NUM_STEPS) -> None:
        self.files: list[Path] = []
        self._folder = folder
        self._has_allocator = is_accelerator(device)
        self._num_left = num_steps
        self._is_first = True
        self._running: profile | None = None
        self._recorded: tuple[str, profile] | None = None

    def around(self, step: int, *, is_measured: bool) -> tuple[Context, Context]:
        """-> contexts for the last micro-batch of a step and for its update: recorded from the start of one to the end of the other."""
        is_due = self._num_left > 0 and not self._is_first and (self._has_allocator or not is_measured)
        self._is_first = False
        return (self._begun(), self._ended(f"step-{step:06d}")) if is_due else (nullcontext(), nullcontext())

    def write(self) -> None:
        """Write the recording of the last step, if any; called outside the measured time of a step."""
        if self._recorded is None:
            return
        name, recorded = self._recorded
        self._recorded = None
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.json.gz"
        recorded.export_chrome_trace(str(path))
        self.files.append(path)
        if self._has_allocator:
            snapshot = self._folder / f"{name}.pickle"
            torch_module().memory._dump_snapshot(str(snapshot))  # the documented way, underscore and all
            torch_module().memory._record_memory_history(enabled=None)
            self.files.append(snapshot)

    def drop(self) -> None:
        """Stop the recording of a step that failed."""
        if self._running is not None:
            self._stop()

    @contextmanager
    def _begun(self) -> Iterator[None]:
        if self._has_allocator:
            torch_module().memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)
        self._running = profile(activities=supported_activities(), with_modules=True)
        self._running.start()
        try:
            yield
        except BaseException:  # out of memory: the step is repeated
            self.drop()
            raise

    @contextmanager
    def _ended(self, name: str) -> Iterator[None]:
        try:
            yield
        finally:
            self._recorded = (name, self._stop())
        self._num_left -= 1

    def _stop(self) -> profile:
        assert self._running is not None
        stopped, self._running = self._running, None
        if self._has_allocator:
            torch_module().synchronize()
        stopped.stop()
        return stopped
