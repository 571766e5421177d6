"""The training loop: a generator of `StepStats`, one per optimizer step.

    rows of the step -> packed micro-batches -> forward and backward of each -> clip -> AdamW update

The loop knows neither files nor screen: the caller saves, shows and decides when to stop pulling. Between two steps the
state is whole, and after TrainingStopped it is that of the last good step. Validation is a function it is given, called
after the update; its seconds are no part of the step's. accelerate places the model and owns backward and clipping.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from accelerate import Accelerator

from qlora_lite.data.batches import Batch, StepSampler, make_batches
from qlora_lite.data.examples import Examples
from qlora_lite.errors import TrainingStopped
from qlora_lite.train.best import best_after
from qlora_lite.train.measure import Allocations, measure_allocations, rss_bytes
from qlora_lite.train.optimizer import set_learning_rate
from qlora_lite.train.schedule import learning_rate_at
from qlora_lite.train.state import TrainState
from qlora_lite.train.step import forward_backward

_WINDOW = 10  # steps whose mean loss is watched
_DIVERGED = 2.0  # stop when that mean is this many times the first loss, and
_DIVERGED_NATS = 1.0  # this many nats above it


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


def train_steps(
    state: TrainState,
    examples: Examples,
    sampler: StepSampler,
    *,
    device: str,
    micro_batch_tokens: int,
    learning_rate: float,
    schedule: str,
    warmup_ratio: float,
    max_grad_norm: float,
    evaluate: Callable[[], float] | None = None,
    eval_every_steps: int = 1,
    early_stop: int | None = None,
) -> Iterator[StepStats]:
    """Train from `state.step` to the sampler's last step. Raises TrainingStopped for NaN or a diverging loss.

    `evaluate` gives the validation loss; it is called after every `eval_every_steps` steps and after the last, and must
    leave model and random numbers as they were. Training ends early when that loss has not fallen for `early_stop` calls.
    The step with the largest micro-batch is measured with the allocator, in its last micro-batch; on CUDA all are.
    """
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    model = accelerator.prepare_model(state.model, device_placement=False)
    measured_step = _step_with_largest_batch(examples, sampler, micro_batch_tokens, first=state.step)
    model.train()
    while not state.is_over(len(sampler), early_stop=early_stop):
        begin = time.perf_counter()
        step = state.step
        rows = sampler.rows_of_step(step)
        batches = [batch.to(device) for batch in make_batches(examples, rows, micro_batch_tokens=micro_batch_tokens)]
        rate = learning_rate_at(
            step, num_steps=len(sampler), peak=learning_rate, schedule=schedule, warmup_ratio=warmup_ratio
        )
        set_learning_rate(state.optimizer, rate)

        is_measured = device == "cuda" or step == measured_step
        backward, clip_and_update = (Allocations(), Allocations()) if is_measured else (None, None)
        try:
            loss, norm = _update(
                state,
                accelerator,
                model,
                batches,
                examples,
                max_grad_norm=max_grad_norm,
                around_last=_measured(device, backward),
                around_update=_measured(device, clip_and_update),
            )
        finally:
            state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        _watch(state, loss, rows, examples)
        stats = StepStats(
            step=state.step,
            num_steps=len(sampler),
            epoch=state.step / sampler.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            num_examples=len(rows),
            num_tokens=sum(batch.input_ids_1T.shape[1] for batch in batches),
            num_label_tokens=sum(len(batch.target_N) for batch in batches),
            num_micro_batches=len(batches),
            step_s=time.perf_counter() - begin,
            rss_bytes=rss_bytes(),
            peak_bytes=_peak_bytes(model, batches, backward, clip_and_update),
        )
        is_due = state.step % eval_every_steps == 0 or state.step == len(sampler)
        yield stats if evaluate is None or not is_due else _evaluated(state, stats, evaluate())


def _update(
    state: TrainState,
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: list[Batch],
    examples: Examples,
    *,
    max_grad_norm: float,
    around_last: AbstractContextManager[object],
    around_update: AbstractContextManager[object],
) -> tuple[float, float]:
    """Forward, backward, clip, AdamW. -> (loss, gradient norm before clipping); raises TrainingStopped before it updates."""
    step = state.step + 1
    loss = forward_backward(
        model,
        batches,
        backward=lambda loss: accelerator.backward(state.scaler.scale(loss)),
        on_batch=lambda batch, loss: _check_loss(loss, step, batch, examples),
        around_last=around_last,
    )
    state.scaler.unscale_(state.optimizer)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(accelerator.clip_grad_norm_(factors, max_grad_norm))
    if not math.isfinite(norm) and not state.scaler.is_enabled():  # with loss scaling such a step is skipped instead
        rows = [row for batch in batches for row in batch.rows]
        raise _stopped(f"the gradient is {norm}", step, rows, examples, state_is_good=True)
    with around_update:
        state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss, norm


def _evaluated(state: TrainState, stats: StepStats, eval_loss: float) -> StepStats:
    if not math.isfinite(eval_loss):
        message = f"stopped at step {state.step}: the validation loss is {eval_loss}. Earlier checkpoints are kept. "
        raise TrainingStopped(message + "Lower train.learning_rate", state_is_good=False)
    state.best = best_after(state.best, step=state.step, eval_loss=eval_loss)
    return replace(stats, eval_loss=eval_loss)


def _measured(device: str, allocations: Allocations | None) -> AbstractContextManager[object]:
    return nullcontext() if allocations is None else measure_allocations(device, allocations)


def _peak_bytes(
    model: torch.nn.Module, batches: list[Batch], backward: Allocations | None, clip_and_update: Allocations | None
) -> int | None:
    """The step's peak above its start: in the last micro-batch or in the update, whose fp32 copies of a large weight count.

    Gradients are there before the last micro-batch begins, unless it is the only one, and before the update in any case.
    """
    if backward is None or clip_and_update is None:
        return None
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before = gradients if len(batches) > 1 else 0
    return max(before + backward.peak_bytes, gradients + clip_and_update.peak_bytes)


def _step_with_largest_batch(examples: Examples, sampler: StepSampler, micro_batch_tokens: int, *, first: int) -> int:
    """Step that packs the longest row, decided on lengths alone: a step of many tokens fills its micro-batches."""
    lengths = examples.lengths
    tokens = {step: int(lengths[sampler.rows_of_step(step)].sum()) for step in range(first, len(sampler))}
    full = [step for step, total in tokens.items() if total >= micro_batch_tokens]
    if not full:
        return max(tokens, key=lambda step: tokens[step], default=first)
    # The fewer tokens are left over, the fuller the micro-batches: an even split of `total` into ceil(total / limit) parts.
    return max(full, key=lambda step: tokens[step] / math.ceil(tokens[step] / micro_batch_tokens))


def _watch(state: TrainState, loss: float, rows: list[int], examples: Examples) -> None:
    """Remember the loss and stop when the last few are far above where training began."""
    state.first_loss = loss if state.first_loss is None else state.first_loss
    state.history = [*state.history, loss][-_WINDOW:]
    mean = fmean(state.history)
    if len(state.history) == _WINDOW and mean > max(_DIVERGED * state.first_loss, state.first_loss + _DIVERGED_NATS):
        what = f"the loss diverged: {mean:.2f} over the last {_WINDOW} steps, {state.first_loss:.2f} at the first"
        raise _stopped(what, state.step, rows, examples, state_is_good=False)


def _check_loss(loss: float, step: int, batch: Batch, examples: Examples) -> None:
    if not math.isfinite(loss):
        raise _stopped(f"the loss is {loss}", step, list(batch.rows), examples, state_is_good=True)


def _stopped(what: str, step: int, rows: list[int], examples: Examples, *, state_is_good: bool) -> TrainingStopped:
    names = ", ".join(examples.row(row).id for row in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    message = (
        f"stopped at step {step}: {what}; rows {names}{more}. Earlier checkpoints are kept. "
        "Look at these rows, or lower train.learning_rate"
    )
    return TrainingStopped(message, state_is_good=state_is_good)
