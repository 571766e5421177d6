"""One optimizer step's arithmetic: micro-batches in, a summed gradient and a loss out.

The loss of a step is the sum over all its label tokens divided by their number. The divisor is the step's, not the
micro-batch's, so a step can be cut anywhere without changing the gradient (a mean of micro-batch means would weigh a
micro-batch with few label tokens too much).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel

from qlora_lite.data.batches import Batch
from qlora_lite.device.numerics import exact_sums
from qlora_lite.memory.ledger import count_as, counted_as
from qlora_lite.memory.measuring import give_back_free_memory
from qlora_lite.model.forward import causal_lm, predicting_states
from qlora_lite.model.head import CHUNK, summed_loss


def batch_loss(model: PeftModel, batch: Batch, *, head_chunk: int = CHUNK) -> torch.Tensor:
    """Cross entropy summed over the batch's label tokens: an fp32 scalar; `head_chunk` of them are projected at once."""
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
    model: PeftModel,
    batches: Sequence[Batch],
    *,
    backward: Callable[[torch.Tensor], None],
    on_batch: Callable[[Batch, float], None],
    around_last: AbstractContextManager[object] | None = None,
    head_chunk: int = CHUNK,
) -> float:
    """Add the gradient of the step's loss to `param.grad`; returns that loss, in nats per label token.

    `backward` runs the backward pass of a scalar (loss scaling is its business); `on_batch` sees each batch with its
    own loss per label token before that, and may raise. `around_last` is entered around the last micro-batch, when all
    gradients are there: the place to measure memory.
    """
    num_label_tokens = sum(len(batch.target_N) for batch in batches)
    total = 0.0
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        measured = around_last if is_last and around_last is not None else nullcontext()
        with measured, exact_sums(), counted_as("activations"):
            loss = batch_loss(model, batch, head_chunk=head_chunk)
            summed = loss.item()
            on_batch(batch, summed / len(batch.target_N))
            count_as("logits")  # until the gradient of the hidden states is there
            backward(loss / num_label_tokens)
            del loss
        if batch.input_ids_1T.is_cpu:
            give_back_free_memory()
        total += summed
    return total / num_label_tokens
