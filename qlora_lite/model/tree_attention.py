"""Attention over a packed prefix tree: a shared passage once, its questions as branches that see the passage and themselves.

    sequence  [ passage | question 1 | question 2 | question 3 ]     segments, each with its parent
    sees      question 2: the passage and itself, nothing of questions 1 and 3

No mask is built. A segment attends to itself with the causal kernel. The descendants of a segment follow it in one stretch, so their
queries attend to the segment in one call. The parts of a query's attention are combined by their log-sum-exps (as in arXiv 2205.14135,
section 3): with m = log(sum of exp of all scores), each part's output has the weight exp(its log-sum-exp - m).

The backward pass uses the kernels' own: given the complete output and log-sum-exp, FlashAttention's backward pass of a part gives that
part's share of the gradients (dS = P * (dP - sum(dO * O)), where P and O belong to the complete row of scores).

Kernels: on the CPU, PyTorch's flash attention for any type; on a card, FlashAttention-2 for 16 bits, the memory-efficient kernel
otherwise (fp32, cards before Ampere, wide heads; see `Card.attention_kernel`), and plain products where neither exists. The operators
are called by name, so that torch cannot choose another kernel. On a card, FlashAttention's backward pass sums dQ with atomic operations,
so its last bits may differ between calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from qlora_lite.memory.ledger import card_of

_aten: Any = torch.ops.aten
NO_PARENT = -1


@dataclass(frozen=True)
class Part:
    """A slice of queries that attends to a slice of keys, causally when both are the same segment."""

    queries: slice
    keys: slice
    is_causal: bool


@lru_cache(maxsize=256)
def parts_of(lengths: tuple[int, ...], parents: tuple[int, ...]) -> tuple[Part, ...]:
    """All parts of a sequence whose segments have these lengths and parents; a parent comes before its children.

    The descendants of a segment must follow it without a gap (depth first). Raises ValueError when they do not.
    """
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    last = list(ends)  # end of a segment with its descendants
    for index in reversed(range(len(parents))):
        if (parent := parents[index]) != NO_PARENT:
            last[parent] = max(last[parent], last[index])
    for index, parent in enumerate(parents):
        if (
            parent >= index
            or (parent != NO_PARENT and starts[index] >= last[parent])
            or not _is_inside(index, parents, starts, last)
        ):
            raise ValueError(f"segment {index} does not follow its parent {parent} without a gap")
    own = [Part(slice(a, b), slice(a, b), True) for a, b in zip(starts, ends, strict=True)]
    shared = [Part(slice(b, z), slice(a, b), False) for a, b, z in zip(starts, ends, last, strict=True) if z > b]
    return (*own, *shared)


@lru_cache(maxsize=256)
def longest_path(lengths: tuple[int, ...], parents: tuple[int, ...]) -> int:
    """Tokens of the longest example of such a sequence."""
    ends: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        ends.append(length + (0 if parent == NO_PARENT else ends[parent]))
    return max(ends)


def _is_inside(index: int, parents: Sequence[int], starts: Sequence[int], last: Sequence[int]) -> bool:
    """Whether the segment is inside every open ancestor, and not among another segment's descendants."""
    before = index - 1
    while before != NO_PARENT and before != parents[index]:
        if starts[index] < last[before]:
            return False
        before = parents[before]
    return before == parents[index]


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part], *, scaling: float
) -> torch.Tensor:
    """query and key [1, H or H_kv, T, d], value [1, H_kv, T, d_v] -> [1, H, T, d_v]; `parts` from `parts_of`: causal ones first."""
    kernel, width = kernel_for(query, value, trains=query.requires_grad), value.shape[-1]
    query, key, value = (kernel.aligned(tensor) for tensor in (query, key, value))
    output: torch.Tensor = _TreeAttention.apply(query, key, value, tuple(parts), scaling, kernel)  # type: ignore[no-untyped-call]
    return output if output.shape[-1] == width else output[..., :width]


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: tuple[Part, ...], scaling: float,
        kernel: "Kernel",
    ) -> torch.Tensor:  # fmt: skip
        batch, heads, tokens, _ = query.shape
        # Laid out as [1, T, H, d], whatever the query's layout: the kernels' backward passes need it, or make a copy.
        output, total = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2), None
        for part in parts:
            q, k, v = query[:, :, part.queries], key[:, :, part.keys], value[:, :, part.keys]
            part_output, part_total = kernel.forward(q, k, v, part.is_causal, scaling)
            if total is None:
                total = torch.empty(query.shape[:3], dtype=part_total.dtype, device=query.device)
            if part.is_causal:  # the first part of these queries
                output[:, :, part.queries], total[:, :, part.queries] = part_output, part_total
                continue
            before, so_far = total[:, :, part.queries], output[:, :, part.queries]
            both = torch.logaddexp(before, part_total)
            so_far.copy_(so_far * (before - both).exp()[..., None] + part_output * (part_total - both).exp()[..., None])
            before.copy_(both)
        assert total is not None, "a row has at least one segment"
        ctx.save_for_backward(query, key, value, output, total)
        ctx.parts, ctx.scaling, ctx.kernel = parts, scaling, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *saved, total = ctx.saved_tensors
        kernel, dtype = ctx.kernel, saved[0].dtype
        query, key, value, output, grad_output = (kernel.widened(tensor) for tensor in (*saved, grad_output))
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for part in ctx.parts:
            q, k, v = query[:, :, part.queries], key[:, :, part.keys], value[:, :, part.keys]
            places = grads[0][:, :, part.queries], grads[1][:, :, part.keys], grads[2][:, :, part.keys]
            part_grads = kernel.backward(
                grad_output[:, :, part.queries], q, k, v, output[:, :, part.queries], total[:, :, part.queries],
                part.is_causal, ctx.scaling,
            )  # fmt: skip
            for place, grad in zip(places, part_grads, strict=True):
                place.copy_(grad) if part.is_causal else place.add_(grad)
        return (*(grad.to(dtype) for grad in grads), None, None, None)


class Kernel(Protocol):
    """Attention of some queries over some keys with the log-sum-exp [1, H, L] of their scores, and its gradients."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor,
        total: torch.Tensor, is_causal: bool, scaling: float,
    ) -> Sequence[torch.Tensor]: ...  # fmt: skip

    def widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the type of the backward pass."""
        return tensor

    def aligned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with heads padded to a width that the kernel takes, with zeros, which change no score."""
        return tensor


class _FlashOnCpu(Kernel):
    def widened(self, tensor):  # type: ignore[no-untyped-def]
        """The tensor in fp32: in bf16 the backward pass takes 1.3 to 5 times as long, because each product packs its inputs first."""
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def forward(self, q, k, v, is_causal, scaling):  # type: ignore[no-untyped-def]
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scaling)

    def backward(self, grad, q, k, v, output, total, is_causal, scaling):  # type: ignore[no-untyped-def]
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, total, 0.0, is_causal, scale=scaling
        )


def _filled_up(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


class _Flash(Kernel):
    """FlashAttention-2, which supports grouped heads."""

    def aligned(self, tensor):  # type: ignore[no-untyped-def]
        return _filled_up(tensor, 8)

    def forward(self, q, k, v, is_causal, scaling):  # type: ignore[no-untyped-def]
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scaling)[:2]

    def backward(self, grad, q, k, v, output, total, is_causal, scaling):  # type: ignore[no-untyped-def]
        nothing = torch.empty(0, dtype=torch.int64, device=q.device)  # no dropout: no random state
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, output, total.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, nothing, nothing,
            scale=scaling,
        )  # fmt: skip


class _Efficient(Kernel):
    """The memory-efficient kernel (arXiv 2112.05682), which needs keys and values for every query head."""

    def aligned(self, tensor):  # type: ignore[no-untyped-def]
        return _filled_up(tensor, 4 if tensor.dtype == torch.float32 else 8)

    def forward(self, q, k, v, is_causal, scaling):  # type: ignore[no-untyped-def]
        output, total, *_ = _aten._scaled_dot_product_efficient_attention(
            q, _expanded(k, q), _expanded(v, q), None, True, 0.0, is_causal, scale=scaling
        )
        return output, total[:, :, : q.shape[2]]

    def backward(self, grad, q, k, v, output, total, is_causal, scaling):  # type: ignore[no-untyped-def]
        rows = torch.nn.functional.pad(
            total, (0, -q.shape[2] % 32), value=math.inf
        )  # the padded length of the forward pass
        nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout: no random state
        grad_q, grad_k, grad_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad, q, _expanded(k, q), _expanded(v, q), None, output, rows.contiguous(), nothing, nothing, 0.0,
            [True, True, True, False], is_causal, scale=scaling,
        )  # fmt: skip
        return grad_q, _summed(grad_k, k), _summed(grad_v, v)


class _Plain(Kernel):
    """Products and a softmax, where no kernel returns the log-sum-exp; memory grows with the square of the length."""

    def forward(self, q, k, v, is_causal, scaling):  # type: ignore[no-untyped-def]
        scores, v = self._scores(q, k, is_causal, scaling), _expanded(v, q)
        total = scores.logsumexp(dim=-1)
        return (scores - total[..., None]).exp().to(q.dtype) @ v, total

    def backward(self, grad, q, k, v, output, total, is_causal, scaling):  # type: ignore[no-untyped-def]
        weights = (self._scores(q, k, is_causal, scaling) - total[..., None]).exp()
        grad_weights = (grad @ _expanded(v, q).mT).to(weights.dtype)
        share = (grad * output).sum(dim=-1, keepdim=True).to(weights.dtype)
        grad_scores = (weights * (grad_weights - share) * scaling).to(q.dtype)
        grad_k, grad_v = grad_scores.mT @ q, weights.to(q.dtype).mT @ grad
        return grad_scores @ _expanded(k, q), _summed(grad_k, k), _summed(grad_v, v)

    def _scores(self, q, k, is_causal, scaling):  # type: ignore[no-untyped-def]
        scores = (q @ _expanded(k, q).mT).to(torch.promote_types(q.dtype, torch.float32)) * scaling
        if is_causal:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return scores


_KERNELS: dict[str, Kernel] = {
    "cpu flash": _FlashOnCpu(),
    "flash": _Flash(),
    "efficient": _Efficient(),
    "plain": _Plain(),
}


def kernel_for(query: torch.Tensor, value: torch.Tensor, *, trains: bool) -> Kernel:
    """The kernel of the tensors' card; `trains`: a backward pass follows."""
    name = card_of(query).attention_kernel(query.dtype, query.shape[-1], value.shape[-1], trains=trains)
    return _KERNELS[name]


def _expanded(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values [1, H_kv, L, d] for every query head."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _summed(grad: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Sum the gradient of an `_expanded` tensor over the heads that shared it."""
    return grad.unflatten(1, (tensor.shape[1], -1)).sum(dim=2)
