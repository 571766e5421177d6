"""The training loop: a generator of `StepStats`, one per optimizer step.

    rows of the step -> packed micro-batches -> forward and backward of each -> clip -> AdamW update

The loop knows neither files nor screen: the caller saves, shows and decides when to stop pulling. Between two steps the
state is whole, and after TrainingStopped it is that of the last good step. Validation is a function it is given, called
after the update; its seconds are no part of the step's. accelerate places the model and owns backward and clipping.
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
from qlora_lite.training.trace import Trace
from qlora_lite.training.update import NotFinite, OutOfMemoryInUpdate, update
from qlora_lite.units import row_in_words

_WINDOW = 10  # steps whose mean loss is watched
_DIVERGED = 2.0  # stop when that mean is this many times the first loss, and
_DIVERGED_NATS = 1.0  # this many nats above it


@dataclass(frozen=True)
class _Done:
    """What an optimizer step leaves behind."""

    loss: float
    norm: float
    batches: list[Batch]
    peaks: dict[str, int] | None


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
    peak_bytes: int | None  # of this step above its start, by the allocator; None where it was not measured
    eval_loss: float | None = None  # on held-out rows; None where it was not due
    phase_peaks: dict[str, int] | None = None  # the peak of forward, head, backward and update apart
    other_cores: float | None = None  # that the rest of the machine kept busy meanwhile, on average


def train_steps(
    state: TrainState,
    examples: Examples,
    sampler: StepSampler,
    *,
    device: str,
    footprint: Footprint,
    learning_rate: float,
    schedule: str,
    warmup_ratio: float,
    max_grad_norm: float,
    evaluate: Callable[[], float] | None = None,
    eval_every_steps: int = 1,
    early_stop: int | None = None,
    leaner: Leaner = lambda footprint: None,
    trace: Trace | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[StepStats]:
    """Train from `state.step` to the sampler's last step. Raises TrainingStopped for NaN or a diverging loss.

    `footprint` says how a step is computed, unless `state` knows that it had to be leaner. A step that runs out of memory in
    its forward or backward passes is repeated with what `leaner` gives, said through `say`; DoesNotFit when that is nothing,
    and when memory runs out inside the update, where there is no way back.

    `evaluate` gives the validation loss; it is called after every `eval_every_steps` steps and after the last, and must
    leave model and random numbers as they were. Training ends early when that loss has not fallen for `early_stop` calls.
    The step with the largest micro-batch is measured with the allocator, in its last micro-batch; on an accelerator all are. `trace`
    records a few others.
    """
    accelerator = Accelerator(
        cpu=card_here() is None, mixed_precision="no"
    )  # it knows the machine; where we compute is our own choice
    model = accelerator.prepare_model(state.model, device_placement=False)
    state.footprint = state.footprint or footprint
    apply_footprint(state.model, state.footprint)
    tokens = state.footprint.micro_batch_tokens
    measured_step = step_with_largest_batch(examples, sampler, tokens, first=state.step)
    model.train()
    other_work = OtherWork()
    while not state.is_over(len(sampler), early_stop=early_stop):
        begin = time.perf_counter()
        step = state.step
        other_work.cores()  # of the time between two steps
        rows = sampler.rows_of_step(step)
        rate = learning_rate_at(
            step, num_steps=len(sampler), peak=learning_rate, schedule=schedule, warmup_ratio=warmup_ratio
        )
        set_learning_rate(state.optimizer, rate)
        is_measured = is_accelerator(device) or step == measured_step

        def work(now: Footprint, rows: list[int] = rows, step: int = step, is_measured: bool = is_measured) -> _Done:
            batches = make_batches(examples, rows, micro_batch_tokens=now.micro_batch_tokens, share=sampler.shares)
            backward, clip_and_update = Allocations(), Allocations()
            traced = trace.around(step + 1, is_measured=is_measured) if trace else (nullcontext(), nullcontext())
            loss, norm = update(
                model,
                state.optimizer,
                [batch.to(device) for batch in batches],
                backward=accelerator.backward,
                clip=accelerator.clip_grad_norm_,
                scaler=state.scaler,
                max_grad_norm=max_grad_norm,
                on_batch=partial(_check_loss, step + 1, examples),
                around_last=_inside(traced[0], measure_allocations(device, backward) if is_measured else nullcontext()),
                around_update=_inside(
                    traced[1], measure_allocations(device, clip_and_update) if is_measured else nullcontext()
                ),
                head_chunk=now.head_chunk,
            )
            return _Done(
                loss, norm, batches, _peaks(model, batches, backward, clip_and_update) if is_measured else None
            )

        try:
            done = within_memory(state, work, leaner=leaner, say=say, what=f"step {step + 1}")
            step_s = time.perf_counter() - begin
        except NotFinite as error:
            raise _stopped(str(error), step + 1, rows, examples, state_is_good=True) from error
        except OutOfMemoryInUpdate as error:
            raise DoesNotFit(
                f"step {step + 1}: out of memory while the weights were updated ({error}). Use train.optimizer=paged_adamw_8bit, a "
                "smaller lora.r or a smaller model"
            ) from error
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            if trace is not None:
                trace.drop()
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
            other_cores=other_work.cores(),
        )
        if trace is not None:
            trace.write()
        is_due = state.step % eval_every_steps == 0 or state.step == len(sampler)
        yield stats if evaluate is None or not is_due else _evaluated(state, stats, evaluate())


@contextmanager
def _inside(outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> Iterator[None]:
    with outer, inner:
        yield


def _evaluated(state: TrainState, stats: StepStats, eval_loss: float) -> StepStats:
    if not math.isfinite(eval_loss):
        message = f"stopped at step {state.step}: the validation loss is {eval_loss}. Earlier checkpoints are kept. "
        raise TrainingStopped(message + "Lower train.learning_rate", state_is_good=False)
    state.best = best_after(state.best, step=state.step, eval_loss=eval_loss)
    return replace(stats, eval_loss=eval_loss)


def _peaks(
    model: torch.nn.Module, batches: list[Batch], backward: Allocations, clip_and_update: Allocations
) -> dict[str, int]:
    """The step's peaks above its start: of its last micro-batch, and of the update, whose fp32 copies of a large weight count.

    Gradients are there before the last micro-batch begins, unless it is the only one, and before the update in any case.
    """
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before = gradients if len(batches) > 1 else 0
    found = {PHASES[name]: before + peak for name, peak in backward.peaks.items()}
    return found | {"update": gradients + clip_and_update.peak_bytes}


def _watch(state: TrainState, loss: float, rows: list[int], examples: Examples) -> None:
    """Remember the loss and stop when the last few are far above where training began."""
    state.first_loss = loss if state.first_loss is None else state.first_loss
    state.history = [*state.history, loss][-_WINDOW:]
    mean = fmean(state.history)
    if len(state.history) == _WINDOW and mean > max(_DIVERGED * state.first_loss, state.first_loss + _DIVERGED_NATS):
        what = f"the loss diverged: {mean:.2f} over the last {_WINDOW} steps, {state.first_loss:.2f} at the first"
        raise _stopped(what, state.step, rows, examples, state_is_good=False)


def _check_loss(step: int, examples: Examples, batch: Batch, loss: float) -> None:
    if not math.isfinite(loss):
        raise _stopped(f"the loss is {loss}", step, list(batch.rows), examples, state_is_good=True)


def _stopped(what: str, step: int, rows: list[int], examples: Examples, *, state_is_good: bool) -> TrainingStopped:
    ids = [examples.row(row).id for row in rows[:8]]
    names = ", ".join(ids) if row_in_words(ids[0]) == ids[0] else f"rows {', '.join(ids)}"
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    message = (
        f"stopped at step {step}: {what}; {names}{more}. Earlier checkpoints are kept. "
        "Look at these rows, or lower train.learning_rate"
    )
    return TrainingStopped(message, state_is_good=state_is_good)
