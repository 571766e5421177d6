"""Internal allocations of operators on a card, derived from their sources and not measured yet (tools/gpu_check measures them).

    FlashAttention-2 forward     short sequences leave multiprocessors idle, so keys are split among them: fp32 sums of every split
                                 (flash_api.cpp, set_params_splitkv)
    FlashAttention-2 backward    dQ in fp32 in blocks of 128 queries, the row sums, and for grouped heads dK and dV of every query head
                                 (flash_api.cpp, mha_bwd)
    memory-efficient forward     fp32 sums of the output for 16 bits and heads wider than 128 (kernel_forward.h)
    memory-efficient backward    blocks of dQ, for wide heads on small cards also of dK and dV, and in fp32 the product of dO and O
                                 (attention_backward.cu, kernel_backward.h)
    gemm_4bit                    the whole 16-bit weight, and its scales twice, unless the fused kernel runs (bitsandbytes
                                 backends/cuda/ops.py): always for up to 4 rows, on some cards for more, so this is an upper bound

B is the batch, H the query heads, S tokens, D the head width. Widths above 128 are rounded up to multiples of 64, others of 32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qlora_lite.device.card import Card

_ops: Any = torch.ops
Workspace = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
_MOST_SPLITS = 128
_FUSED_ROWS = 4  # of gemm_4bit, on any card
_SMALL_SHARED_MEMORY = (
    (8, 6),
    (8, 9),
    (12, 0),
    (12, 1),
)  # capabilities whose efficient backward uses 64 x 64 blocks for heads wider than 64


def card_workspace(card: Card) -> Workspace:
    """Return a function: a call of an operator on `card` -> bytes allocated inside."""

    def workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
        count = _COUNTS.get(func)
        return count(card, args) if count is not None else 0

    return workspace


def _flash_forward(card: Card, args: Sequence[Any]) -> int:
    query, key = args[0], args[1]
    batch, heads, num_queries, width = query.shape
    if num_queries == 1 and heads > key.shape[1]:  # the query heads of a group become queries
        num_queries, heads = heads // key.shape[1], key.shape[1]
    block = 256 if width <= 64 else 128 if width <= 128 else 64
    rows = batch * heads * math.ceil(num_queries / 64)
    splits = num_splits(rows, 2 * card.num_sms, math.ceil(key.shape[2] / block))
    return 4 * splits * batch * heads * num_queries * (_rounded(width) + 1) if splits > 1 else 0


def num_splits(num_row_blocks: int, num_sms: int, num_key_blocks: int) -> int:
    """Return the number of key splits of FlashAttention-2: the fewest with 85% of the best multiprocessor utilization."""
    if num_row_blocks >= 0.8 * num_sms:
        return 1
    most = min(_MOST_SPLITS, num_sms, num_key_blocks)
    differing = [
        splits
        for splits in range(1, most + 1)
        if splits == 1 or math.ceil(num_key_blocks / splits) != math.ceil(num_key_blocks / (splits - 1))
    ]
    waves = {splits: num_row_blocks * splits / num_sms for splits in differing}
    use = {splits: wave / math.ceil(wave) for splits, wave in waves.items()}
    return next((splits for splits in differing if use[splits] >= 0.85 * max(use.values())), 1)


def _flash_backward(card: Card, args: Sequence[Any]) -> int:
    grad, query, key, output = args[0], args[1], args[2], args[4]
    batch, heads, num_queries, width = query.shape
    padded = batch * heads * 128 * math.ceil(num_queries / 128)
    sums = 4 * padded * (_rounded(width) + 1)
    expanded = 2 * query.element_size() * batch * heads * key.shape[2] * width if heads != key.shape[1] else 0
    return sums + expanded + _copied(grad) + _copied(output)


def _efficient_forward(card: Card, args: Sequence[Any]) -> int:
    query, value = args[0], args[2]
    is_wide = max(query.shape[-1], value.shape[-1]) > 128 and query.dtype != torch.float32
    return 4 * math.prod(query.shape[:-1]) * value.shape[-1] if is_wide else 0


def _efficient_backward(card: Card, args: Sequence[Any]) -> int:
    """Return the workspace of the largest candidate kernel: torch's headers do not say which one fits a card's shared memory."""
    grad, query, key, value = args[:4]
    is_half = query.dtype != torch.float32
    rows_BH, num_queries = query.shape[0] * query.shape[1], query.shape[2]
    blocks = _efficient_blocks(card, max(query.shape[-1], value.shape[-1]), is_half=is_half)
    workspace = max(_efficient_sums(card, query, key, value, block, is_half=is_half) for block in blocks)
    delta = 4 * rows_BH * num_queries
    # In fp32, delta comes from a separate product, computed before the kernel's sums are allocated.
    product = 0 if is_half else 4 * rows_BH * num_queries * value.shape[-1] + delta
    return max(workspace, product) + delta + _copied(grad)


def _efficient_blocks(card: Card, widest: int, *, is_half: bool) -> list[tuple[int, int, bool]]:
    """-> (rows, columns, whether dK and dV stay in registers) of the candidate kernels for heads of width `widest`."""
    capability = card.capability or (0, 0)
    has_room = capability >= (8, 0) and capability not in _SMALL_SHARED_MEMORY
    if widest <= 64 or capability < (7, 0):
        return [(64, 64, is_half and widest <= 64)]
    if not is_half:
        return [(128, 64, False), (64, 64, False)]
    if capability < (8, 0):
        return [(128, 64, widest <= 128), (64, 64, False)]
    if widest <= 96 and capability in ((8, 6), (8, 9)):
        return [(128, 64, True)]
    return [(128, 128, widest <= 128)] if has_room else [(64, 64, False)]


def _efficient_sums(
    card: Card,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: tuple[int, int, bool],
    *,
    is_half: bool,
) -> int:
    """Return bytes of the gradients that one kernel sums in fp32: blocks of dQ, and of dK and dV if registers do not hold them."""
    rows, columns, in_registers = block
    rows_BH, num_queries, width = query.shape[0] * query.shape[1], query.shape[2], query.shape[3]
    num_keys, has_splits = key.shape[2], (card.capability or (0, 0)) >= (7, 0)
    splits = math.ceil(num_keys / columns) if has_splits else 1
    if rows_BH >= 256 and num_keys <= 2 * columns:
        splits = 1
    adds_keys = is_half and not in_registers
    if adds_keys:
        splits = max(1, min(splits, 200 // rows_BH))
    of_keys = (
        splits * columns * rows * (math.ceil(width / rows) + math.ceil(value.shape[-1] / rows)) if adds_keys else 0
    )
    of_queries = math.ceil(num_queries / rows) * math.ceil(width / columns) * (4 + rows * columns)
    floats = of_keys + (of_queries if has_splits or is_half else 0)
    return 4 * rows_BH * 4 * math.ceil(floats / 4)


def _gemm_4bit(card: Card, args: Sequence[Any]) -> int:
    inputs, shape, blocksize = args[0], args[2], args[4]
    num_weights = math.prod(shape)
    if inputs.numel() // inputs.shape[-1] <= _FUSED_ROWS and inputs.shape[-1] % blocksize == 0:
        return 0
    return inputs.element_size() * num_weights + 8 * math.ceil(num_weights / blocksize)


def _copied(tensor: torch.Tensor) -> int:
    """Return bytes of the copy that a kernel makes of [B, H, S, D] unless its memory layout is [B, S, H, D]."""
    has_kernel_layout = tensor.transpose(1, 2).is_contiguous()
    return 0 if has_kernel_layout else tensor.numel() * tensor.element_size()


def _rounded(width: int) -> int:
    multiple = 32 if width <= 128 else 64
    return multiple * math.ceil(width / multiple)


_COUNTS: dict[Any, Callable[[Card, Sequence[Any]], int]] = {
    _ops.aten._scaled_dot_product_flash_attention.default: _flash_forward,
    _ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _ops.aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    _ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
}
