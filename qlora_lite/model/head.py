"""The loss without a full logits tensor: only positions that carry a label are projected, a chunk at a time.

For a row of T tokens and a vocabulary V, logits in fp32 take 4*T*V bytes (2,048 tokens x 49,152: 384 MiB, several times over
in the backward pass). In question answering a few tokens of a row carry a label, so we keep those N hidden states, project
a chunk of them at a time through the model's own head and recompute each chunk in the backward pass: 4*chunk*V bytes, whatever T.

Sums, not means: the caller divides once by the label tokens of the whole optimizer step, so that an example counts the same
however the step is split.
"""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lite.memory.ledger import count_as_after, counted_as

CHUNK = 256  # label positions projected at once: 48 MiB of fp32 logits at V = 49,152
ROWS = (
    16  # a chunk is filled up to a multiple of this: matrix kernels for one row sum up in another order than for many
)
NO_LABEL = -100  # what cross_entropy ignores


def summed_loss(
    model: PreTrainedModel, hidden_ND: torch.Tensor, target_N: torch.Tensor, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Cross entropy of the labelled positions, summed (not averaged), as an fp32 scalar.

    hidden_ND are the decoder's last hidden states at the positions that predict a label, target_N the label ids; `chunk` of
    them are projected at once.
    """
    count_as_after(hidden_ND, "recompute")
    missing = -len(target_N) % ROWS
    hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, missing))
    target_N = torch.nn.functional.pad(target_N, (0, missing), value=NO_LABEL)
    losses = [
        checkpoint(_chunk_loss, model, hidden_nD, target_n, use_reentrant=False, preserve_rng_state=False)
        for hidden_nD, target_n in zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def project(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in fp32 from hidden states, by the model's own head."""
    return finish_logits(model.get_output_embeddings()(hidden_ND).float(), model.config)


def finish_logits(logits_NV: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What some models do to the head's product: a soft cap (Gemma, arXiv 2408.00118) or a divisor (Granite)."""
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits_NV = logits_NV / divisor
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


def _chunk_loss(model: PreTrainedModel, hidden_nD: torch.Tensor, target_n: torch.Tensor) -> torch.Tensor:
    with counted_as("logits"):
        logits_nV = project(model, hidden_nD)
        return torch.nn.functional.cross_entropy(logits_nV, target_n, reduction="sum", ignore_index=NO_LABEL)
