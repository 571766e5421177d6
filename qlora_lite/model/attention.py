"""Attention over one packed row: several examples one after the other, each attending to itself only.

A padded batch computes attention, norms and matrix products on padding; a packed row has none, and its linear layers see one
long [T, D] input. Here each example's slice goes through `scaled_dot_product_attention` with `is_causal`, so that no mask is
built and every example is computed exactly as it would be alone, whatever shares the row: the split of a step into
micro-batches cannot change a gradient (tests/promises/test_promise_01_split.py).

Registered through transformers' `AttentionInterface`. No mask function is registered under its name, so transformers builds
no mask. Generation pads and keeps a cache: `attention_for_generation` switches to transformers' own "sdpa" and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

PACKED = "qlora_lite_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a packed row.

    query is [1, H, T, d], key and value [1, H_kv, T, d], `lengths` sums to T; returns [1, T, H, d]. The signature is that of
    transformers' attention functions, which pass further keywords that do not matter here.
    """
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            one_query, one_key, one_value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
        for one_query, one_key, one_value in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def attention_for_generation(model: PreTrainedModel) -> Iterator[None]:
    """Padded batches with a key/value cache inside this block, packed rows again after it."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED)


AttentionInterface.register(PACKED, packed_attention)
