"""One whole optimizer step: forward and backward of every micro-batch, clip, AdamW. What the loop runs and what a plan rehearses."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator

from qlora_lite.data.batches import Batch
from qlora_lite.ledger import counted_as
from qlora_lite.train.step import forward_backward


class NotFinite(Exception):
    """The gradient is not a number, and nothing has been updated."""


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    on_batch: Callable[[Batch, float], None] = lambda batch, loss: None,
    around_last: AbstractContextManager[object] | None = None,
    around_update: AbstractContextManager[object] | None = None,
    before_backward: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """-> (loss, gradient norm before clipping). Raises NotFinite before it updates; with loss scaling such a step is skipped instead.

    `on_batch` and `around_last` are forward_backward's; `around_update` is entered around AdamW.
    """

    def backward(loss: torch.Tensor) -> None:
        before_backward()
        accelerator.backward(scaler.scale(loss))

    loss = forward_backward(
        model,  # type: ignore[arg-type]
        batches,
        backward=backward,
        on_batch=on_batch,
        around_last=around_last,
    )
    with counted_as("workspace"):
        scaler.unscale_(optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = float(accelerator.clip_grad_norm_(trained, max_grad_norm))
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise NotFinite(f"the gradient is {norm}")
        with around_update or nullcontext():
            scaler.step(optimizer)
        scaler.update()
    return loss, norm
