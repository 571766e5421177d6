"""Attention of a chunk: the queries of some tokens of a packed sequence, over the keys and values of the whole sequence.

A layer that runs chunk by chunk (residency.py) keeps its keys and values in `KeysValues`, first to last. A chunk's queries see

    their own segment in the chunk       causal kernel, on the chunk's own keys
    earlier keys of the segment, and     rectangles from the store, at most KEY_BLOCK keys at a time
    its ancestors in the prefix tree

and the parts are combined in fp32 by their log-sum-exps, as in tree_attention.py. The backward pass goes from the last chunk to the first.
A chunk's queries add to the fp32 gradients of the earlier keys and values, so those of a chunk are complete when its turn comes.

Sliding windows and soft caps need masks or scores: `with_earlier` gathers the keys that a chunk's queries see, for autograd.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lite.memory.ledger import HOST_KEYS_VALUES
from qlora_lite.model.host_tensors import Home, empty_on_host, on_device, wait_for_copies
from qlora_lite.model.tree_attention import NO_PARENT, Kernel, Part, kernel_for, parts_of

KEY_BLOCK = 8192  # keys of a rectangle at a time: bounds the copies of keys that wait on the host


class KeysAreComplete(Exception):
    """Raised by attention when a pass only collects keys and values: the rest of the layer is not computed."""


class KeysValues:
    """Keys and values [1, H_kv, T, d] of one layer for a whole sequence, and their gradients in fp32."""

    def __init__(self, num_tokens: int, home: Home, *, with_gradients: bool) -> None:
        self._num_tokens, self._home, self._with_gradients = num_tokens, home, with_gradients
        self._values: tuple[torch.Tensor, ...] = ()
        self._gradients: tuple[torch.Tensor, ...] = ()

    def put(self, own: Sequence[torch.Tensor], tokens: slice) -> None:
        """Store a chunk's keys and values."""
        if not self._values:
            self._values = tuple(self._empty(tensor, tensor.dtype) for tensor in own)
            if self._with_gradients:
                self._gradients = tuple(self._empty(tensor, torch.float32) for tensor in own)
                wait_for_copies(own[0].device)  # reused host memory may still be read
                for gradient in self._gradients:
                    gradient.zero_()
        for place, tensor in zip(self._values, own, strict=True):
            place[:, :, tokens].copy_(tensor, non_blocking=True)

    def get(self, tokens: slice, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Keys and values of `tokens`, on the device."""
        return tuple(on_device(tensor[:, :, tokens], device, self._home) for tensor in self._values)

    def add_gradients(self, tokens: slice, gradients: Sequence[torch.Tensor]) -> None:
        """Add the gradients of `tokens` by one chunk's queries."""
        for total, gradient in zip(self._gradients, gradients, strict=True):
            total[:, :, tokens].add_(gradient.to(total.device))  # a card's copy is complete when `to` returns

    def gradients(self, tokens: slice, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Sums of the gradients of `tokens` by later queries, on the device."""
        return tuple(on_device(total[:, :, tokens], device, self._home) for total in self._gradients)

    def _empty(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        batch, heads, _, width = like.shape
        shape = (batch, self._num_tokens, heads, width)  # a slice of tokens is one piece of memory
        if self._home == "host":
            return empty_on_host(shape, dtype, like.device, HOST_KEYS_VALUES).transpose(1, 2)
        return torch.empty(shape, dtype=dtype, device=like.device).transpose(1, 2)


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `stop` of a sequence in one layer, passed to attention as the keyword `chunk`."""

    start: int
    stop: int
    store: KeysValues
    only_keys: bool = False  # collect keys and values, and raise KeysAreComplete
    trains: bool = False  # a backward pass follows, now or in a recomputation

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    def take(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the chunk's keys and values. Raises KeysAreComplete if nothing else is wanted."""
        self.store.put((key.detach(), value.detach()), self.tokens)
        if self.only_keys:
            raise KeysAreComplete

    def parts(self, lengths: tuple[int, ...], parents: tuple[int, ...]) -> tuple[Part, ...]:
        """The parts of this chunk's queries, causal ones first, long rectangles in blocks of keys; positions of the whole sequence."""
        causal, rectangles = list[Part](), list[Part]()
        for part in parts_of(lengths, parents):
            queries = slice(max(part.queries.start, self.start), min(part.queries.stop, self.stop))
            if queries.start >= queries.stop:
                continue
            last_key = part.keys.stop
            if part.is_causal:
                causal.append(Part(queries, queries, True))
                last_key = queries.start
            for first in range(part.keys.start, last_key, KEY_BLOCK):
                rectangles.append(Part(queries, slice(first, min(first + KEY_BLOCK, last_key)), False))
        return (*causal, *rectangles)

    def segments(self, lengths: tuple[int, ...]) -> tuple[tuple[int, slice], ...]:
        """-> (start of the segment, its tokens in this chunk), for each segment with tokens in it."""
        segments, start = [], 0
        for length in lengths:
            tokens = slice(max(start, self.start), min(start + length, self.stop))
            if tokens.start < tokens.stop:
                segments.append((start, tokens))
            start += length
        return tuple(segments)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    *,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scaling: float,
) -> torch.Tensor:
    """query and key [1, H or H_kv, c, d], value [1, H_kv, c, d_v] of a chunk of c tokens -> [1, H, c, d_v]."""
    kernel, width = kernel_for(query, value, trains=chunk.trains), value.shape[-1]
    query, key, value = (kernel.aligned(tensor) for tensor in (query, key, value))
    chunk.take(key, value)
    parts = chunk.parts(lengths, parents or (NO_PARENT,) * len(lengths))
    output: torch.Tensor = _ChunkAttention.apply(query, key, value, chunk, parts, scaling, kernel)  # type: ignore[no-untyped-call]
    return output if output.shape[-1] == width else output[..., :width]


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: Chunk, parts: tuple[Part, ...],
        scaling: float, kernel: Kernel,
    ) -> torch.Tensor:  # fmt: skip
        batch, heads, tokens, _ = query.shape
        width, wide = value.shape[-1], torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(batch, tokens, heads, width, dtype=wide).transpose(1, 2)
        total: torch.Tensor | None = None
        for part in parts:
            rows = _rows(part.queries, chunk)
            keys, values = (
                (key[:, :, rows], value[:, :, rows]) if part.is_causal else chunk.store.get(part.keys, query.device)
            )
            part_output, part_total = kernel.forward(query[:, :, rows], keys, values, part.is_causal, scaling)
            del keys, values
            if total is None:
                total = torch.empty(query.shape[:3], dtype=part_total.dtype, device=query.device)
            if part.is_causal:  # the first part of these queries
                output[:, :, rows], total[:, :, rows] = part_output, part_total
                continue
            before, so_far = total[:, :, rows], output[:, :, rows]
            both = torch.logaddexp(before, part_total)
            so_far.mul_((before - both).exp()[..., None]).add_(part_output * (part_total - both).exp()[..., None])
            before.copy_(both)
        assert total is not None, "a chunk has at least one segment"
        # Laid out as [1, c, H, d], as the kernels' backward passes need it.
        output = output.transpose(1, 2).to(query.dtype).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.chunk, ctx.parts, ctx.scaling, ctx.kernel = chunk, parts, scaling, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *saved, total = ctx.saved_tensors
        kernel, chunk, dtype, device = ctx.kernel, ctx.chunk, saved[0].dtype, saved[0].device
        query, output, grad_output = (kernel.widened(tensor) for tensor in (saved[0], saved[3], grad_output))
        grad_query = torch.zeros(query.shape, dtype=torch.float32, device=device)
        own = [torch.zeros(tensor.shape, dtype=torch.float32, device=device) for tensor in saved[1:3]]
        for part in ctx.parts:
            rows = _rows(part.queries, chunk)
            keys, values = (
                (saved[1][:, :, rows], saved[2][:, :, rows]) if part.is_causal else chunk.store.get(part.keys, device)
            )
            grad_q, *grads = kernel.backward(
                grad_output[:, :, rows], query[:, :, rows], kernel.widened(keys), kernel.widened(values), output[:, :, rows],
                total[:, :, rows], part.is_causal, ctx.scaling,
            )  # fmt: skip
            del keys, values
            grad_query[:, :, rows] += grad_q
            if part.is_causal:
                for total_grad, grad in zip(own, grads, strict=True):
                    total_grad[:, :, rows] += grad
            else:
                chunk.store.add_gradients(part.keys, grads)
            del grad_q, grads
        by_later = chunk.store.gradients(chunk.tokens, device)  # and by this chunk's own rectangles
        grad_key, grad_value = ((mine + later).to(dtype) for mine, later in zip(own, by_later, strict=True))
        return grad_query.to(dtype), grad_key, grad_value, None, None, None, None


def _rows(tokens: slice, chunk: Chunk) -> slice:
    return slice(tokens.start - chunk.start, tokens.stop - chunk.start)


def own_keys_values(key: torch.Tensor, value: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a chunk's keys and values, and return them with the gradients of later chunks added in the backward pass."""
    chunk.take(key, value)
    if not (key.requires_grad or value.requires_grad):
        return key, value
    pair: tuple[torch.Tensor, torch.Tensor] = _Own.apply(key, value, chunk)  # type: ignore[no-untyped-call]
    return pair


def with_earlier(
    key: torch.Tensor, value: torch.Tensor, chunk: Chunk, first: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens `first` to `stop` of the sequence, the chunk's own among them; `key` and `value` as `own_keys_values`."""
    if first >= chunk.start:
        rows = slice(first - chunk.start, stop - chunk.start)
        return key[:, :, rows], value[:, :, rows]
    pair: tuple[torch.Tensor, torch.Tensor] = _WithEarlier.apply(key, value, chunk, first, stop)  # type: ignore[no-untyped-call]
    return pair


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, value: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.chunk = chunk
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        by_later = ctx.chunk.store.gradients(ctx.chunk.tokens, grads[0].device)
        return (*((grad.float() + later).to(grad.dtype) for grad, later in zip(grads, by_later, strict=True)), None)


class _WithEarlier(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, chunk: Chunk, first: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.chunk, ctx.first, ctx.stop = chunk, first, stop
        ctx.shapes = key.shape, value.shape
        earlier = chunk.store.get(slice(first, chunk.start), key.device)
        own = slice(0, stop - chunk.start)
        joined = [torch.cat((old, new[:, :, own]), dim=2) for old, new in zip(earlier, (key, value), strict=True)]
        return joined[0], joined[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        chunk, num_earlier = ctx.chunk, ctx.chunk.start - ctx.first
        chunk.store.add_gradients(slice(ctx.first, chunk.start), [grad[:, :, :num_earlier] for grad in grads])
        own = []
        for grad, shape in zip(grads, ctx.shapes, strict=True):
            whole = grad.new_zeros(shape)
            whole[:, :, : ctx.stop - chunk.start] = grad[:, :, num_earlier:]
            own.append(whole)
        return (*own, None, None, None)
