"""What an operator allocates and frees inside itself, which no ledger sees: one function an operator, by device.

    CPU    bitsandbytes' AdamW for 8-bit states works on fp32 copies in five tensors, for 32-bit states in three
           (its Python kernels; tests/plan/test_workspace.py measures them with the allocator)
           flash attention: score blocks a thread, forward 6 bytes a score and its rows, backward 12 (PyTorch, FlashAttentionKernel.cpp),
           and what its 16-bit matrix products pack for themselves, which is measured where the plan is made
           16-bit matrix products: buffers of oneDNN, a few hundred KB however large the matrices; measured too
    cards  card_workspace.py

A block of scores is 256 x 512, 64 x 512 or 32 x 512, the fewer rows the shorter the sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from qlora_lite.device.card import Card
from qlora_lite.plan.card_workspace import card_workspace
from qlora_lite.train.measure import measure_allocations

_ops: Any = torch.ops
Count = Callable[[Sequence[Any], int], int]


def workspace_of(card: Card, *, num_threads: int) -> Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]:
    """-> bytes inside a call of an operator, for a `Ledger`."""
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
    rows, columns = _score_block(query.shape[2], key.shape[2])
    reduced = 2 if query.dtype != torch.float32 else 0  # bytes of a score in the inputs' own type
    return num_threads * (rows * columns * (4 + reduced) + 2 * 4 * rows + 4 * rows * query.shape[3])


def _flash_backward_on_cpu(args: Sequence[Any], num_threads: int) -> int:
    query, key = args[1], args[2]  # after the gradient
    num_queries, num_keys, width = query.shape[2], key.shape[2], query.shape[3]
    blocks = _backward_blocks(num_queries, num_keys, query.dtype, num_threads)
    is_reduced = query.dtype in (torch.bfloat16, torch.float16)
    return blocks + (_packed_on_cpu(min(num_queries, 1024), min(num_keys, 1024), width) if is_reduced else 0)


def _backward_blocks(num_queries: int, num_keys: int, dtype: torch.dtype, num_threads: int) -> int:
    rows, columns = _score_block(num_queries, num_keys)
    reduced = 2 if dtype != torch.float32 else 0
    return num_threads * (2 * rows * columns * (4 + reduced) + 4 * rows)


@cache
def _packed_on_cpu(num_queries: int, num_keys: int, width: int) -> int:
    """What 16-bit matrix products of the backward pass pack for themselves: oneDNN's decision for a processor, measured on one head."""
    query, key = (torch.zeros(1, 1, length, width, dtype=torch.bfloat16) for length in (num_queries, num_keys))
    output, total = _ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key)
    backward = _ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for _ in range(2):  # the first makes what is made once
        with measure_allocations("cpu") as allocations:
            grads = backward(output, query, key, key, output, total, 0.0, False)
    blocks = _backward_blocks(num_queries, num_keys, query.dtype, torch.get_num_threads())
    return max(0, allocations.peak_bytes - sum(grad.nbytes for grad in grads) - blocks)


def _product_on_cpu(left: torch.Tensor, right: torch.Tensor) -> int:
    """left [n, k] @ right [k, m]. The buffers hardly grow beyond the sizes that are measured."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return 0
    (n, k), m = left.shape, right.shape[1]
    return _buffers_of_product(min(n, 512), min(k, 2048), min(m, 256), left.dtype)


@cache
def _buffers_of_product(n: int, k: int, m: int, dtype: torch.dtype) -> int:
    left, right = torch.zeros(n, k, dtype=dtype), torch.zeros(k, m, dtype=dtype)
    for _ in range(2):  # the first makes what is made once
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
