"""Attention over one packed sequence: several examples in a row, each attending to itself only.

A padded batch computes attention, norms and matrix products on padding; a packed sequence has none, and its linear layers see one long
[T, D] input. Each example's slice goes through a causal kernel (tree_attention.py; a sequence without sharing is its simplest case). No
mask is built, and every example is computed exactly as it would be alone, whatever else is in the sequence, so the split of a step into
micro-batches cannot change a gradient (tests/promises/test_promise_01_split.py).

A sliding window (Mistral, Gemma, ...) or a soft cap on the scores (Gemma 2, arXiv 2408.00118) needs a mask or the scores. Queries then
go in blocks, so that memory grows with the length and not with its square. The backward pass recomputes capped scores block by block.

Registered through transformers' `AttentionInterface`. No mask function is registered under its name, so transformers builds no mask.
BLOOM and Falcon compute attention in their own modules: `packs_rows` is false for them, and forward.py runs their examples one at a
time. Generation pads and keeps a cache: `attention_for_generation` switches to transformers' attention and back. There and under a
mask, a card whose kernels do not support grouped heads gets keys and values for every head: torch would otherwise use plain products,
whose memory grows with the square of the length.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_lite.memory.ledger import card_of
from qlora_lite.model.chunk_attention import Chunk, chunk_attention, own_keys_values, with_earlier
from qlora_lite.model.tree_attention import NO_PARENT, longest_path, parts_of, tree_attention

PACKED, PADDED = "qlora_lite_packed", "qlora_lite_padded"
QUERY_BLOCK = 512  # queries per block where scores or a mask are needed


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lengths: tuple[int, ...],
    parents: tuple[int, ...] = (),
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    chunk: Chunk | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of a packed sequence, and to its ancestors; `parents` has each segment's parent.

    query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d]; `lengths` sums to T. With `sliding_window`, a query sees that many
    keys, including its own; `softcap` c bounds scores to c * tanh(score / c). With `chunk`, the tensors have the tokens of a chunk only
    (residency.py). The signature is that of transformers' attention functions, which pass further, irrelevant keywords. Raises
    ValueError for shared segments with dropout, window or soft cap.
    """
    parents = parents or (NO_PARENT,) * len(lengths)
    is_in_window = sliding_window is None or longest_path(lengths, parents) <= sliding_window
    is_plain = not dropout and softcap is None and is_in_window
    is_shared = any(parent != NO_PARENT for parent in parents)
    if is_shared and not is_plain:
        raise ValueError("segments that continue others need plain attention: no dropout, window or soft cap")
    if chunk is not None:
        if is_plain:
            output = chunk_attention(query, key, value, chunk, lengths=lengths, parents=parents, scaling=scaling)
        else:
            output = _masked_chunk(
                query, key, value, chunk, lengths, scaling=scaling, window=sliding_window, softcap=softcap
            )
        return output.transpose(1, 2).contiguous(), None
    if is_shared or (is_plain and _kernel(query, value) != "plain"):
        parts = parts_of(lengths, parents)
        return tree_attention(query, key, value, parts, scaling=scaling).transpose(1, 2).contiguous(), None
    outputs = [
        _one_example(*qkv, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap)
        for qkv in zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def packs_rows(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether the attention of a model or class goes through `AttentionInterface`, so that a sequence can hold several examples.

    The attribute is private to transformers; tests/model/test_attention.py checks it for each architecture.
    """
    return bool(model._supports_attention_backend)


def why_not_shared(kind: type[PreTrainedModel], config: PreTrainedConfig, *, length: int) -> str | None:
    """The reason why examples of at most `length` tokens cannot share a prefix in this model; None when they can."""
    if not packs_rows(kind):
        return f"{kind.__name__} computes attention in its own modules"
    window = sliding_window(config)
    if window is not None and window < length:
        return f"some layers see only a sliding window of {window} tokens, and rows have up to {length}"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    if getattr(config, "attention_dropout", None):
        return "its attention drops weights at random"
    return None


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Keys that a query sees in layers with a window; None without such layers. Qwen's configs name a window and do not use it."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def attention_for_generation(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, attention over padded batches with a key/value cache; restore the previous one afterwards."""
    return _attention(model, padded_attention(type(model)))


def attention_on_packed_rows(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, attention over packed sequences; restore the previous one afterwards."""
    return _attention(model, PACKED)


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def padded_attention(kind: type[PreTrainedModel]) -> str:
    """transformers' name of the attention for padded batches: "eager" where sdpa cannot compute it (soft caps, BLOOM)."""
    if not kind._supports_sdpa:
        return "eager"
    return PADDED if packs_rows(kind) else "sdpa"


def padded_rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention [B, H, T, d] -> [B, T, H, d]. For a prompt without a mask, keys and values are repeated first if the
    card's kernel does not support grouped ones. (With a mask transformers repeats them; a single query needs little memory.)"""
    is_prompt = attention_mask is None and query.shape[2] > 1
    if not is_prompt or _kernel(query, value) != "efficient":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    key, value = _for_every_head(key, query), _for_every_head(value, query)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=settings.get("scaling"), is_causal=settings.get("is_causal", True) is not False
    )
    return output.transpose(1, 2).contiguous(), None


def _kernel(query: torch.Tensor, value: torch.Tensor) -> str:
    card = card_of(query)
    return card.attention_kernel(query.dtype, query.shape[-1], value.shape[-1], trains=query.requires_grad)


def _for_every_head(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values [B, H_kv, L, d] for every query head."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _masked_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    lengths: tuple[int, ...],
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [1, H, c, d] of a chunk of c tokens with a sliding window or a soft cap."""
    key, value = own_keys_values(key, value, chunk)
    outputs = []
    for start, tokens in chunk.segments(lengths):
        first = start if window is None else max(start, tokens.start - window + 1)
        keys, values = with_earlier(key, value, chunk, first, tokens.stop)
        queries = query[:, :, tokens.start - chunk.start : tokens.stop - chunk.start]
        outputs.append(
            _one_example(queries, keys, values, scaling=scaling, dropout=0.0, window=window, softcap=softcap)
        )
    return torch.cat(outputs, dim=2)


def _one_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [1, H, L, d] of the last L tokens of an example, whose keys and values [1, H_kv, E + L, d] have E earlier ones."""
    length = key.shape[2]
    if query.shape[2] < length:
        return _in_blocks(query, key, value, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
    if softcap is None and not dropout and _kernel(query, value) != "plain" and (window is None or length <= window):
        return tree_attention(query, key, value, parts_of((length,), (NO_PARENT,)), scaling=scaling)
    if softcap is None and (window is None or length <= window):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
    return _in_blocks(query, key, value, scaling=scaling, dropout=dropout, window=window, softcap=softcap)


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`_one_example` with a mask, a block of queries at a time."""
    num_queries, earlier = query.shape[2], key.shape[2] - query.shape[2]
    block: Callable[..., torch.Tensor] = partial(_soft_capped, scaling=scaling, dropout=dropout, softcap=softcap or 0.0)
    if num_queries > QUERY_BLOCK and torch.is_grad_enabled():
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=dropout > 0)
    blocks = []
    for start in range(earlier, earlier + num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, earlier + num_queries)
        first = 0 if window is None else max(0, start - window + 1)
        positions_q = torch.arange(start, stop, device=query.device)[:, None]
        positions_k = torch.arange(first, stop, device=query.device)[None]
        visible_qk = positions_k <= positions_q
        if window is not None:
            visible_qk &= positions_k > positions_q - window
        inputs = (
            query[:, :, start - earlier : stop - earlier],
            key[:, :, first:stop],
            value[:, :, first:stop],
            visible_qk,
        )
        if softcap is None:
            if not card_of(query).is_cpu:
                inputs = inputs[0], _for_every_head(inputs[1], query), _for_every_head(inputs[2], query), inputs[3]
            blocks.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *inputs, dropout_p=dropout, scale=scaling, enable_gqa=True
                )
            )
        else:
            blocks.append(block(*inputs))
    return torch.cat(blocks, dim=2)


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible_qk: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores in the compute type and their softmax in fp32, as in transformers' eager attention."""
    key, value = _for_every_head(key, query), _for_every_head(value, query)
    scores_qk = torch.tanh((query @ key.mT) * scaling / softcap) * softcap
    scores_qk = scores_qk.masked_fill(~visible_qk, torch.finfo(scores_qk.dtype).min)
    weights_qk = torch.softmax(scores_qk, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights_qk, p=dropout) @ value


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PADDED, padded_rows_attention)
AttentionMaskInterface.register(PADDED, sdpa_mask)
