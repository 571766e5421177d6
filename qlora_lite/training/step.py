"""One optimizer step, from micro-batches to updated weights: run by the loop, rehearsed by a plan.

    update             one whole step
      forward_backward   its micro-batches, one after another: gradients accumulate in `param.grad`
        batch_loss         one micro-batch through decoder and head
      clip, AdamW

The loss of a step is the sum over all its label tokens divided by their number. The divisor is the step's, not the micro-batch's, so a step
can be split anywhere without changing the gradient (a mean of micro-batch means would overweight a micro-batch with few label tokens).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.data.batches import Batch
from qlora_lite.device.numerics import exact_sums
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.memory.ledger import count_as, counted_as
from qlora_lite.memory.measuring import give_back_free_memory
from qlora_lite.model.forward import causal_lm, predicting_states
from qlora_lite.model.head import CHUNK, summed_loss
from qlora_lite.model.residency import one_step


class NotFinite(Exception):
    """The gradient is NaN or infinite; no weight has been updated."""


class OutOfMemoryInUpdate(Exception):
    """Memory ran out after some weights may have changed."""


class Observer:
    """Observes a step during its computation; this base class ignores it."""

    def see_loss(self, batch: Batch, loss: float) -> None:
        """A micro-batch's loss per label token, before its backward pass. May raise."""

    def around_last(self) -> AbstractContextManager[object]:
        """Entered around the last micro-batch, when the gradients of all earlier ones are in memory."""
        return nullcontext()

    def around_update(self) -> AbstractContextManager[object]:
        """Entered around AdamW."""
        return nullcontext()


def batch_loss(model: PeftModel | PreTrainedModel, batch: Batch, *, head_chunk: int = CHUNK) -> torch.Tensor:
    """Return the cross entropy summed over the batch's label tokens, an fp32 scalar; `head_chunk` tokens are projected at a time."""
    hidden_ND = predicting_states(
        model,
        input_ids_1T=batch.input_ids_1T,
        position_ids_1T=batch.position_ids_1T,
        lengths=batch.lengths,
        parents=batch.parents,
        predictor_N=batch.predictor_N,
    )
    return summed_loss(causal_lm(model), hidden_ND, batch.target_N, chunk=head_chunk)


def forward_backward(
    model: PeftModel | PreTrainedModel,
    batches: Sequence[Batch],
    *,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    observer: Observer = Observer(),
    head_chunk: int = CHUNK,
) -> float:
    """Add the gradient of the step's loss to `param.grad`, and return the loss in nats per label token.

    `backward` runs the backward pass of a scalar, including any loss scaling.
    """
    num_label_tokens = sum(len(batch.target_N) for batch in batches)
    total = 0.0
    for batch in batches:
        around = observer.around_last() if batch is batches[-1] else nullcontext()
        with around, exact_sums(), counted_as("activations"), one_step(causal_lm(model)):
            loss = batch_loss(model, batch, head_chunk=head_chunk)
            summed = loss.item()
            observer.see_loss(batch, summed / len(batch.target_N))
            count_as("logits")  # until the gradient of the hidden states is computed
            backward(loss / num_label_tokens)
            del loss
        if batch.input_ids_1T.is_cpu:
            give_back_free_memory()
        total += summed
    return total / num_label_tokens


def update(
    model: PeftModel | PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    accelerator: Accelerator | None = None,
    observer: Observer = Observer(),
    head_chunk: int = CHUNK,
) -> tuple[float, float]:
    """-> (loss, gradient norm before clipping). Raises NotFinite before the update; with loss scaling, the update is skipped instead.

    `accelerator` runs backward pass and clipping if other processes take part. A lack of memory raises torch's own error before the first
    weight changes, and OutOfMemoryInUpdate afterwards.
    """
    backward = accelerator.backward if accelerator else torch.Tensor.backward
    clip = accelerator.clip_grad_norm_ if accelerator else torch.nn.utils.clip_grad_norm_
    loss = forward_backward(
        model, batches, backward=lambda loss: backward(scaler.scale(loss)), observer=observer, head_chunk=head_chunk
    )
    with counted_as("workspace"), _no_way_back():
        scaler.unscale_(optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = float(clip(trained, max_grad_norm))
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise NotFinite(f"the gradient is {norm}")
        with observer.around_update():
            scaler.step(optimizer)
        scaler.update()
    return loss, norm


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Convert a lack of memory inside the block to OutOfMemoryInUpdate: some weights may have changed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryInUpdate(str(error)) from error
