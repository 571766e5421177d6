"""Internal allocations of operators, which a ledger does not see: one function per operator and device.

    CPU    bitsandbytes' AdamW uses fp32 copies in five tensors for 8-bit states, in three for 32-bit states
           (its Python kernels; tests/plan/test_workspace.py measures them with the allocator)
           flash attention: score blocks per thread, forward 6 bytes per score and its rows, backward 12 (PyTorch,
           FlashAttentionKernel.cpp), and packing buffers of its 16-bit matrix products, measured on the planning machine: on processors
           with AMX, another copy of keys and values
           16-bit matrix products: buffers of oneDNN, also measured, by shape and transposed side: a few hundred KB, up to 7 MB on
           processors with AMX
    cards  card_workspace.py

A block of scores is 256 x 512, 64 x 512 or 32 x 512; shorter sequences have fewer rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from qlora_lite.device.accelerator import cpu_has_amx
from qlora_lite.device.card import Card
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.plan.card_workspace import card_workspace

_ops: Any = torch.ops
Count = Callable[[Sequence[Any], int], int]
_HALF_TYPES = (torch.bfloat16, torch.float16)
_MEASURED_KEYS = 512  # attention processes keys in blocks of this size
_MEASURED_PRODUCT, _MEASURED_PRODUCT_AMX = (1024, 2048, 1024), (2048, 4096, 4096)


def workspace_of(card: Card, *, num_threads: int) -> Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]:
    """Return a function for a `Ledger`: a call of an operator -> bytes allocated inside."""
    if not card.is_cpu:
        return card_workspace(card)

    def workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
        count = _CPU.get(func)
        return count(args, num_threads) if count is not None else 0

    return workspace


def _adamw(num_copies: int) -> Count:
    return lambda args, _: 4 * num_copies * args[1].numel()  # args: name, gradient, weight, ...


def _flash_forward_on_cpu(args: Sequence[Any], num_threads: int) -> int:
    query, key = args[0], args[1]
    num_queries, num_keys, width = query.shape[2], key.shape[2], query.shape[3]
    blocks = _forward_blocks(num_queries, num_keys, width, query.dtype, num_threads)
    if query.dtype not in _HALF_TYPES:
        return blocks
    measured = min(num_keys, _MEASURED_KEYS)
    fixed, of_head = _packed_forward_on_cpu(min(num_queries, _MEASURED_KEYS), measured, width, query.dtype)
    return blocks + fixed + of_head * key.shape[0] * key.shape[1] * num_keys // measured


def _forward_blocks(num_queries: int, num_keys: int, width: int, dtype: torch.dtype, num_threads: int) -> int:
    rows, columns = _score_block(num_queries, num_keys)
    reduced = 2 if dtype in _HALF_TYPES else 0  # bytes per score in the inputs' type
    return num_threads * (rows * columns * (4 + reduced) + 2 * 4 * rows + 4 * rows * width)


@cache
def _packed_forward_on_cpu(num_queries: int, num_keys: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """-> (fixed bytes, bytes per key head) of packing buffers in the forward pass's 16-bit products, measured on one and two heads."""
    attend = _ops.aten._scaled_dot_product_flash_attention_for_cpu
    blocks = _forward_blocks(num_queries, num_keys, width, dtype, torch.get_num_threads())
    packed = []
    for heads in (1, 2):
        query, key = (torch.zeros(1, heads, length, width, dtype=dtype) for length in (num_queries, num_keys))
        for _ in range(2):  # the first call also allocates one-time buffers
            with measure_allocations("cpu") as allocations:
                output, total = attend(query, key, key, 0.0, num_queries == num_keys)
        packed.append(allocations.peak_bytes - output.nbytes - total.nbytes - blocks)
    one, two = packed
    return max(0, 2 * one - two), max(0, two - one)


def _flash_backward_on_cpu(args: Sequence[Any], num_threads: int) -> int:
    query, key = args[1], args[2]  # after the gradient
    num_queries, num_keys, width = query.shape[2], key.shape[2], query.shape[3]
    blocks = _backward_blocks(num_queries, num_keys, query.dtype, num_threads)
    if query.dtype not in _HALF_TYPES:
        return blocks
    return blocks + _packed_on_cpu(min(num_queries, 1024), min(num_keys, 1024), width)


def _backward_blocks(num_queries: int, num_keys: int, dtype: torch.dtype, num_threads: int) -> int:
    rows, columns = _score_block(num_queries, num_keys)
    reduced = 2 if dtype in _HALF_TYPES else 0
    return num_threads * (2 * rows * columns * (4 + reduced) + 4 * rows)


@cache
def _packed_on_cpu(num_queries: int, num_keys: int, width: int) -> int:
    """Return bytes of packing buffers in the backward pass's 16-bit products: oneDNN decides by processor; measured on one head."""
    query, key = (torch.zeros(1, 1, length, width, dtype=torch.bfloat16) for length in (num_queries, num_keys))
    output, total = _ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key)
    backward = _ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for _ in range(2):  # the first call also allocates one-time buffers
        with measure_allocations("cpu") as allocations:
            grads = backward(output, query, key, key, output, total, 0.0, False)
    blocks = _backward_blocks(num_queries, num_keys, query.dtype, torch.get_num_threads())
    return max(0, allocations.peak_bytes - sum(grad.nbytes for grad in grads) - blocks)


def _product_on_cpu(left: torch.Tensor, right: torch.Tensor) -> int:
    """Return buffer bytes of left [n, k] @ right [k, m]; they hardly grow beyond the largest measured sizes."""
    if left.dtype not in _HALF_TYPES:
        return 0
    (n, k), m = left.shape, right.shape[1]
    max_n, max_k, max_m = _MEASURED_PRODUCT_AMX if cpu_has_amx() else _MEASURED_PRODUCT
    return _buffers_of_product(
        min(n, max_n), min(k, max_k), min(m, max_m), left.dtype, _is_transposed(left), _is_transposed(right)
    )


def _is_transposed(matrix: torch.Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.shape[0] > 1


@cache
def _buffers_of_product(
    n: int, k: int, m: int, dtype: torch.dtype, is_left_transposed: bool, is_right_transposed: bool
) -> int:
    left = torch.zeros(k, n, dtype=dtype).T if is_left_transposed else torch.zeros(n, k, dtype=dtype)
    right = torch.zeros(m, k, dtype=dtype).T if is_right_transposed else torch.zeros(k, m, dtype=dtype)
    for _ in range(2):  # the first call also allocates one-time buffers
        with measure_allocations("cpu") as allocations:
            product = left @ right
    return max(0, allocations.peak_bytes - product.nbytes)


def _score_block(num_queries: int, num_keys: int) -> tuple[int, int]:
    rows = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(rows, num_queries), min(512, num_keys)


_CPU: dict[Any, Count] = {
    _ops.aten.mm.default: lambda args, _: _product_on_cpu(args[0], args[1]),
    _ops.aten.addmm.default: lambda args, _: _product_on_cpu(args[1], args[2]),  # args: bias, left, right
    _ops.bitsandbytes.optimizer_update_8bit_blockwise.default: _adamw(5),
    _ops.bitsandbytes.optimizer_update_32bit.default: _adamw(3),
    _ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward_on_cpu,
    _ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward_on_cpu,
}
