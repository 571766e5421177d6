"""What the commonest operators make of contiguous tensors on meta, by shape alone.

torch works these out in Python, by its reference implementations, in 0.1 to 0.3 ms a call; a rehearsal has thousands of them. Whatever is
not plainly an elementwise operation, a concatenation or a norm of everything is left to torch: tensors that are not contiguous, whose
result may lie otherwise, too. That both ways hold the same bytes: tests/test_meta_ops.py, tests/promises/test_promise_06_plan.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_aten: Any = torch.ops.aten
_ELEMENTWISE = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default,
    _aten.pow.Tensor_Scalar, _aten.rsqrt.default, _aten.tanh.default, _aten.bitwise_and.Scalar, _aten.bitwise_or.Tensor,
    _aten.__rshift__.Scalar, _aten.__lshift__.Scalar,
}  # fmt: skip
_NEEDS_FLOATS = {_aten.div.Tensor, _aten.div.Scalar, _aten.rsqrt.default, _aten.tanh.default, _aten.pow.Tensor_Scalar}


def quick_result(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What `func` returns, or None where torch is to be asked."""
    if func in _ELEMENTWISE:
        return _elementwise(func, args)
    if func is _aten.cat.default:
        return _concatenation(args)
    if func is _aten.linalg_vector_norm.default and not kwargs and len(args) < 3 and _is_plain(args[0]):
        return torch.empty((), dtype=args[0].dtype, device="meta")
    return None


def _elementwise(func: Any, args: Sequence[Any]) -> torch.Tensor | None:
    first = args[0]
    if not _is_plain(first) or (func in _NEEDS_FLOATS and not first.is_floating_point()):
        return None
    if len(args) == 1 or func is _aten.pow.Tensor_Scalar:
        return torch.empty(first.shape, dtype=first.dtype, device="meta")
    second = args[1]
    if not isinstance(second, torch.Tensor):
        return torch.empty(first.shape, dtype=torch.result_type(first, second), device="meta")
    if not (_is_plain(second) or second.dim() == 0):
        return None
    shape = first.shape if second.shape == first.shape else torch.broadcast_shapes(first.shape, second.shape)
    return torch.empty(shape, dtype=torch.result_type(first, second), device="meta")


def _concatenation(args: Sequence[Any]) -> torch.Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    if not all(_is_plain(t) and t.dtype == first.dtype and t.dim() == first.dim() for t in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_meta and tensor.is_contiguous()
