"""The screen of a training run: a live line on a terminal, a plain line every few seconds elsewhere.

    with TrainScreen(num_steps) as screen:
        for stats in train(...):
            screen.update(stats)

Losses and speeds are means over the last `WINDOW` steps, the loss weighted by label tokens: single steps of a few questions are too
noisy to read. Time left is the remaining steps at the mean pace of that window, without evaluations. A step with a validation loss
always gets a line. When other programs use much of the processor and slow the steps down, the line shows how much.
"""

import time
from collections import deque
from types import TracebackType
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qlora_lite.memory.host import in_words
from qlora_lite.show.text import console, say
from qlora_lite.units import format_bytes, format_seconds

WINDOW = 10
LINE_EVERY_S = 5.0


class StepLike(Protocol):
    """The fields of a step that the screen reads; `train`'s StepStats has them."""

    @property
    def step(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def epoch(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def num_examples(self) -> int: ...
    @property
    def num_label_tokens(self) -> int: ...
    @property
    def step_s(self) -> float: ...
    @property
    def rss_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int | None: ...
    @property
    def eval_loss(self) -> float | None: ...
    @property
    def other_cores(self) -> float | None: ...


class TrainScreen:
    """Shows each StepStats. Writes to stderr only, and holds nothing that the program needs."""

    def __init__(self, num_steps: int, *, first_step: int = 0, line_every_s: float = LINE_EVERY_S) -> None:
        self.num_steps = num_steps
        self.line_every_s = line_every_s
        self._recent: deque[StepLike] = deque(maxlen=WINDOW)
        self._highest_rss_bytes = 0
        self._last_line_s = float("-inf")
        self._validation = ""  # text about the newest evaluation
        self._progress = _progress() if console().is_terminal else None
        self._task = TaskID(0)
        if self._progress is not None:
            self._task = self._progress.add_task("training", total=num_steps, completed=first_step, words="")

    def __enter__(self) -> "TrainScreen":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, stats: StepLike) -> None:
        """Show one more step."""
        self._recent.append(stats)
        self._highest_rss_bytes = max(self._highest_rss_bytes, stats.rss_bytes)
        if stats.eval_loss is not None:
            self._validation = f"  validation loss {stats.eval_loss:.3f} after step {stats.step}"
        details = f"learning rate {stats.learning_rate:.1e}  gradient norm {stats.grad_norm:.2f}{self._validation}"
        if self._progress is not None:
            words = f"{self._words(stats)}\n{details}"
            self._progress.update(self._task, completed=stats.step, total=stats.num_steps, words=words)
            return
        now_s, is_due = time.monotonic(), stats.step >= stats.num_steps or stats.eval_loss is not None
        if is_due or now_s - self._last_line_s >= self.line_every_s:
            self._last_line_s = now_s
            say(f"step {stats.step}/{stats.num_steps}  epoch {stats.epoch:.2f}  {self._words(stats)}  {details}")

    def _words(self, stats: StepLike) -> str:
        busy_s = max(sum(step.step_s for step in self._recent), 1e-9)
        label_tokens = sum(step.num_label_tokens for step in self._recent)
        loss = sum(step.loss * step.num_label_tokens for step in self._recent) / max(label_tokens, 1)
        examples = sum(step.num_examples for step in self._recent)
        left_s = (stats.num_steps - stats.step) * busy_s / len(self._recent)
        if stats.peak_bytes is None:
            memory = f"{format_bytes(stats.rss_bytes)}, peak {format_bytes(self._highest_rss_bytes)}"
        else:  # two different meters, so name both
            memory = f"process {format_bytes(stats.rss_bytes)}, allocator peak {format_bytes(stats.peak_bytes)}"
        remark = in_words(sum((step.other_cores or 0.0) * step.step_s for step in self._recent) / busy_s)
        return "  ".join(
            (
                f"loss {loss:.3f}",
                f"{label_tokens / busy_s:.0f} label tokens/s",
                f"{examples / busy_s:.2f} examples/s",
                f"{format_seconds(left_s)} left",
                memory,
                *([f"busy: {remark}"] if remark else []),
            )
        )


def _progress() -> Progress:
    count = TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False)
    return Progress(count, BarColumn(bar_width=24), TextColumn("{task.fields[words]}", markup=False), console=console())
