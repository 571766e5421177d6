"""One whole optimizer step: forward and backward of every micro-batch, clip, AdamW. What the loop runs and what a plan rehearses."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from qlora_lite.data.batches import Batch
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.memory.ledger import counted_as
from qlora_lite.model.head import CHUNK
from qlora_lite.training.step import forward_backward

Clip = Callable[[Sequence[torch.nn.Parameter], float], torch.Tensor]  # (parameters, greatest norm) -> norm before


class NotFinite(Exception):
    """The gradient is not a number, and nothing has been updated."""


class OutOfMemoryInUpdate(Exception):
    """Memory ran out when some weights may have been changed already."""


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    clip: Clip = torch.nn.utils.clip_grad_norm_,
    on_batch: Callable[[Batch, float], None] = lambda batch, loss: None,
    around_last: AbstractContextManager[object] | None = None,
    around_update: AbstractContextManager[object] | None = None,
    head_chunk: int = CHUNK,
) -> tuple[float, float]:
    """-> (loss, gradient norm before clipping). Raises NotFinite before it updates; with loss scaling such a step is skipped instead.

    `on_batch`, `around_last` and `head_chunk` are forward_backward's; `around_update` is entered around AdamW; `backward` and `clip` may
    be accelerate's, which know of other processes. Memory that runs out before the first weight is changed raises whatever torch raises;
    afterwards, OutOfMemoryInUpdate.
    """
    loss = accumulate(
        model,
        batches,
        scaler=scaler,
        backward=backward,
        on_batch=on_batch,
        around_last=around_last,
        head_chunk=head_chunk,
    )
    with counted_as("workspace"), _no_way_back():
        scaler.unscale_(optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = float(clip(trained, max_grad_norm))
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise NotFinite(f"the gradient is {norm}")
        with around_update or nullcontext():
            scaler.step(optimizer)
        scaler.update()
    return loss, norm


def accumulate(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    *,
    scaler: torch.amp.GradScaler,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    on_batch: Callable[[Batch, float], None] = lambda batch, loss: None,
    around_last: AbstractContextManager[object] | None = None,
    head_chunk: int = CHUNK,
) -> float:
    """A step without its update: the loss, and its scaled gradient added to `param.grad`. See forward_backward."""
    return forward_backward(
        model,  # type: ignore[arg-type]
        batches,
        backward=lambda loss: backward(scaler.scale(loss)),
        on_batch=on_batch,
        around_last=around_last,
        head_chunk=head_chunk,
    )


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Out of memory inside: some weights may be changed and others not."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryInUpdate(str(error)) from error
