"""The training loop: a generator of `StepStats`, one per optimizer step.

    examples of the step -> packed micro-batches -> `update` (step.py): forward and backward of each, clip, AdamW

The loop uses neither files nor screen: the caller saves, prints, and stops iterating. Between two steps the state is consistent; after
TrainingStopped it is that of the last good step. The validation function is an argument, called after the update; its time is not part of
the step's. accelerate places the model and runs backward and clipping.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from accelerate import Accelerator

from qlora_lite.data.batches import Batch, StepSampler, make_batches, step_with_largest_batch
from qlora_lite.data.examples import Examples
from qlora_lite.device.accelerator import card_here, is_accelerator
from qlora_lite.device.waiting import ShortWaits
from qlora_lite.errors import DoesNotFit, TrainingStopped
from qlora_lite.memory.host import OtherWork
from qlora_lite.memory.ledger import PHASES
from qlora_lite.memory.measuring import Allocations, measure_allocations, rss_bytes
from qlora_lite.training.best import best_after
from qlora_lite.training.footprint import Footprint, apply_footprint
from qlora_lite.training.optimizer import set_learning_rate
from qlora_lite.training.preflight import Leaner, within_memory
from qlora_lite.training.schedule import learning_rate_at
from qlora_lite.training.state import TrainState
from qlora_lite.training.step import NotFinite, Observer, OutOfMemoryInUpdate, update
from qlora_lite.training.trace import Trace
from qlora_lite.units import row_in_words

_SHARED = 2**22  # numbers: enough for torch to share their sum among threads
_WINDOW = 10  # steps of the watched mean loss
_DIVERGED = 2.0  # stop when that mean is this many times the first loss, and
_DIVERGED_NATS = 1.0  # this many nats above it


@dataclass(frozen=True)
class TrainSettings:
    """Settings of all steps of a run."""

    device: str
    learning_rate: float
    schedule: str
    warmup_ratio: float
    max_grad_norm: float
    eval_every_steps: int = 1
    early_stop: int | None = None  # evaluations without a lower validation loss


@dataclass(frozen=True)
class StepStats:
    """One optimizer step. Losses are in nats per label token: `loss` before the update, `eval_loss` after it."""

    step: int  # from 1
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float  # of factors A; LoRA+ multiplies it for B
    grad_norm: float  # before clipping
    num_examples: int
    num_tokens: int
    num_label_tokens: int
    num_micro_batches: int
    step_s: float
    rss_bytes: int
    peak_bytes: int | None  # allocator's peak above the step's start; None if not measured
    eval_loss: float | None = None  # on held-out examples; None if not due
    phase_peaks: dict[str, int] | None = None  # peaks of forward, head, backward and update
    other_cores: float | None = None  # mean number of cores that other programs used during the step


def train_steps(
    state: TrainState,
    examples: Examples,
    sampler: StepSampler,
    settings: TrainSettings,
    *,
    evaluate: Callable[[], float] | None = None,
    leaner: Leaner = lambda footprint: None,
    trace: Trace | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[StepStats]:
    """Train from `state.step` to the sampler's last step, with `state.footprint`. Raises TrainingStopped, DoesNotFit.

    A step that runs out of memory in forward or backward is repeated with the footprint from `leaner`, and reported through `say`.
    DoesNotFit is raised if `leaner` returns None, or if memory runs out inside the update, which cannot be repeated.

    `evaluate` returns the validation loss; it is called after every `eval_every_steps` steps and after the last, and must not change model
    or random numbers. The allocator's peak is measured in the step with the largest micro-batch, on an accelerator in every step;
    `trace` records a few other steps.
    """
    work, other_work = _Work(state, examples, sampler, settings, trace), OtherWork()
    with ShortWaits(lambda: torch.ones(_SHARED).sum()) as waits:
        while not state.is_over(len(sampler), early_stop=settings.early_stop):
            begin = time.perf_counter()
            other_work.cores()  # discard the time between two steps
            rows = sampler.rows_of_step(state.step)
            rate = learning_rate_at(
                state.step,
                num_steps=len(sampler),
                peak=settings.learning_rate,
                schedule=settings.schedule,
                warmup_ratio=settings.warmup_ratio,
            )
            set_learning_rate(state.optimizer, rate)
            done = work.step(rows, leaner=leaner, say=say)
            step_s, other_cores = time.perf_counter() - begin, other_work.cores()
            waits.follow(other_cores)
            state.step += 1
            _watch(state, done.loss, rows, examples)
            stats = StepStats(
                step=state.step,
                num_steps=len(sampler),
                epoch=state.step / sampler.steps_per_epoch,
                loss=done.loss,
                learning_rate=rate,
                grad_norm=done.norm,
                num_examples=len(rows),
                num_tokens=sum(batch.input_ids_1T.shape[1] for batch in done.batches),
                num_label_tokens=sum(len(batch.target_N) for batch in done.batches),
                num_micro_batches=len(done.batches),
                step_s=step_s,
                rss_bytes=rss_bytes(),
                peak_bytes=None if done.peaks is None else max(done.peaks.values()),
                phase_peaks=done.peaks,
                other_cores=other_cores,
            )
            if trace is not None:
                trace.write()
            is_due = state.step % settings.eval_every_steps == 0 or state.step == len(sampler)
            yield stats if evaluate is None or not is_due else _evaluated(state, stats, evaluate())


@dataclass(frozen=True)
class _Done:
    """The result of an optimizer step."""

    loss: float
    norm: float
    batches: list[Batch]
    peaks: dict[str, int] | None


class _Work:
    """Computes the steps of a run; repeats a step with a leaner footprint when memory runs out."""

    def __init__(
        self, state: TrainState, examples: Examples, sampler: StepSampler, settings: TrainSettings, trace: Trace | None
    ) -> None:
        assert state.footprint is not None
        self._state, self._examples, self._sampler, self._settings = state, examples, sampler, settings
        self._trace = trace
        # accelerate knows the machine, but the device is our choice
        self._accelerator = Accelerator(cpu=card_here() is None, mixed_precision="no")
        self._model = self._accelerator.prepare_model(state.model, device_placement=False)
        apply_footprint(state.model, state.footprint)
        self._measured_step = step_with_largest_batch(
            examples, sampler, state.footprint.micro_batch_tokens, first=state.step
        )
        self._model.train()

    def step(self, rows: list[int], *, leaner: Leaner, say: Callable[[str], None]) -> _Done:
        """Compute one optimizer step and clear the gradients. Raises TrainingStopped, DoesNotFit."""
        state, number = self._state, self._state.step + 1
        try:
            return within_memory(state, partial(self._compute, rows), leaner=leaner, say=say, name=f"step {number}")
        except NotFinite as error:
            raise _stopped(str(error), number, rows, self._examples, state_is_good=True) from error
        except OutOfMemoryInUpdate as error:
            raise DoesNotFit(
                f"step {number}: out of memory while the weights were updated ({error}). Use train.optimizer=paged_adamw_8bit, a "
                "smaller lora.r or a smaller model"
            ) from error
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            if self._trace is not None:
                self._trace.drop()

    def _compute(self, rows: list[int], footprint: Footprint) -> _Done:
        device, number = self._settings.device, self._state.step + 1
        tokens, share_prefixes = footprint.micro_batch_tokens, self._sampler.share_prefixes
        batches = make_batches(self._examples, rows, micro_batch_tokens=tokens, share_prefixes=share_prefixes)
        is_measured = is_accelerator(device) or self._state.step == self._measured_step
        traced = self._trace.around(number, is_measured=is_measured) if self._trace else (nullcontext(), nullcontext())
        observer = _LoopObserver(device if is_measured else None, traced, partial(self._check_loss, number))
        loss, norm = update(
            self._model,
            self._state.optimizer,
            [batch.to(device) for batch in batches],
            scaler=self._state.scaler,
            max_grad_norm=self._settings.max_grad_norm,
            accelerator=self._accelerator,
            observer=observer,
            head_chunk=footprint.head_chunk,
        )
        return _Done(loss, norm, batches, observer.peaks(self._model, len(batches)))

    def _check_loss(self, number: int, batch: Batch, loss: float) -> None:
        if not math.isfinite(loss):
            raise _stopped(f"the loss is {loss}", number, list(batch.rows), self._examples, state_is_good=True)


class _LoopObserver(Observer):
    """Measures a step's allocations (where `device` is given), enters the trace's contexts, and checks every loss."""

    def __init__(
        self,
        device: str | None,
        traced: tuple[AbstractContextManager[object], AbstractContextManager[object]],
        check_loss: Callable[[Batch, float], None],
    ) -> None:
        self._device, self._traced = device, traced
        self._backward, self._update = Allocations(), Allocations()
        self._check_loss = check_loss

    def see_loss(self, batch: Batch, loss: float) -> None:
        self._check_loss(batch, loss)

    @contextmanager
    def around_last(self) -> Iterator[None]:
        with self._measured(self._traced[0], self._backward):
            yield

    @contextmanager
    def around_update(self) -> Iterator[None]:
        with self._measured(self._traced[1], self._update):
            yield

    def peaks(self, model: torch.nn.Module, num_batches: int) -> dict[str, int] | None:
        """Return peaks above the step's start by phase: of its last micro-batch, and of the update with its fp32 copies of weights.

        Gradients are in memory before the last micro-batch, unless it is the only one, and always before the update.
        """
        if self._device is None:
            return None
        gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        before = gradients if num_batches > 1 else 0
        peaks = {PHASES[name]: before + peak for name, peak in self._backward.peaks.items()}
        return peaks | {"update": gradients + self._update.peak_bytes}

    @contextmanager
    def _measured(self, traced: AbstractContextManager[object], into: Allocations) -> Iterator[None]:
        with traced, measure_allocations(self._device, into) if self._device else nullcontext():
            yield


def _evaluated(state: TrainState, stats: StepStats, eval_loss: float) -> StepStats:
    if not math.isfinite(eval_loss):
        message = f"stopped at step {state.step}: the validation loss is {eval_loss}. Earlier checkpoints are kept. "
        raise TrainingStopped(message + "Lower train.learning_rate", state_is_good=False)
    state.best = best_after(state.best, step=state.step, eval_loss=eval_loss)
    return replace(stats, eval_loss=eval_loss)


def _watch(state: TrainState, loss: float, rows: list[int], examples: Examples) -> None:
    """Record the loss, and raise TrainingStopped if the mean of the last few is far above the first."""
    state.first_loss = loss if state.first_loss is None else state.first_loss
    state.history = [*state.history, loss][-_WINDOW:]
    mean = fmean(state.history)
    if len(state.history) == _WINDOW and mean > max(_DIVERGED * state.first_loss, state.first_loss + _DIVERGED_NATS):
        cause = f"the loss diverged: mean {mean:.2f} over the last {_WINDOW} steps, {state.first_loss:.2f} at the first step"
        raise _stopped(cause, state.step, rows, examples, state_is_good=False)


def _stopped(cause: str, step: int, rows: list[int], examples: Examples, *, state_is_good: bool) -> TrainingStopped:
    ids = [examples.row(row).id for row in rows[:8]]
    names = ", ".join(ids) if row_in_words(ids[0]) == ids[0] else f"rows {', '.join(ids)}"
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    message = (
        f"stopped at step {step}: {cause}; {names}{more}. Earlier checkpoints are kept. "
        "Check these rows, or lower train.learning_rate"
    )
    return TrainingStopped(message, state_is_good=state_is_good)
