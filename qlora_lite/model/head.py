"""The loss without a full logits tensor: only positions that carry a label are projected, one chunk at a time.

For a sequence of T tokens and a vocabulary V, logits in fp32 take 4*T*V bytes (2,048 tokens x 49,152: 384 MiB, several times in the
backward pass). In question answering only a few tokens carry a label, so we keep those N hidden states, project one chunk of them at a
time through the model's own head, and recompute each chunk in the backward pass: 4*chunk*V bytes, for any T.

The loss is a sum, not a mean: the caller divides once by the label tokens of the whole optimizer step, so the weight of an example does
not depend on the split of the step.
"""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lite.memory.ledger import count_as_after, counted_as
from qlora_lite.model.residency import residency_of

CHUNK = 256  # label positions projected at once: 48 MiB of fp32 logits at V = 49,152
ROWS = 16  # chunks are padded to a multiple of this: matrix kernels for one row sum in another order than for many
NO_LABEL = -100  # the target that cross_entropy ignores


def summed_loss(
    model: PreTrainedModel, hidden_ND: torch.Tensor, target_N: torch.Tensor, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Sum (not mean) of the cross entropies of the labelled positions, an fp32 scalar.

    hidden_ND: last hidden states of the decoder at the positions that predict a label; target_N: label ids; `chunk` positions are
    projected at once.
    """
    count_as_after(hidden_ND, "recompute")
    residency = residency_of(model)
    if residency is not None:
        residency.drop_head_after(hidden_ND)
    missing = -len(target_N) % ROWS
    hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, missing))
    target_N = torch.nn.functional.pad(target_N, (0, missing), value=NO_LABEL)
    losses = [
        checkpoint(_chunk_loss, model, hidden_nD, target_n, use_reentrant=False, preserve_rng_state=False)
        for hidden_nD, target_n in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def project(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in fp32 from hidden states [N, D], by the model's own head."""
    return finish_logits(model.get_output_embeddings()(hidden_ND).float(), model.config)


def finish_logits(logits_NV: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Apply the soft cap (Gemma, arXiv 2408.00118) or the divisor (Granite) of some models to the logits [N, V]."""
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits_NV = logits_NV / divisor
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


def _chunk_loss(model: PreTrainedModel, hidden_nD: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
    with counted_as("logits"):
        logits_nV = project(model, hidden_nD)
        return torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="sum", ignore_index=NO_LABEL)
