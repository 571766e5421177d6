"""Results by shape are what torch's own meta kernels give: shape, type and strides."""

import pytest
import torch

from qlora_lite.meta_ops import quick_result

aten = torch.ops.aten


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


A, B, ROW, ONE = on_meta(3, 4), on_meta(3, 4, dtype=torch.float32), on_meta(4), on_meta(dtype=torch.float32)
WHOLE = on_meta(3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (A, A)),
        (aten.add.Tensor, (A, B)),
        (aten.add.Tensor, (A, 2.0)),
        (aten.add.Tensor, (WHOLE, 1.5)),
        (aten.mul.Tensor, (ROW, A)),
        (aten.mul.Tensor, (A, ONE)),
        (aten.mul.Tensor, (ONE, A)),
        (aten.sub.Tensor, (B, ROW)),
        (aten.mul.Tensor, (on_meta(3, 1), ROW)),
        (aten.mul.Scalar, (A, 3)),
        (aten.div.Tensor, (A, B)),
        (aten.div.Scalar, (A, 3)),
        (aten.neg.default, (WHOLE,)),
        (aten.rsqrt.default, (B,)),
        (aten.tanh.default, (A,)),
        (aten.pow.Tensor_Scalar, (A, 2)),
        (aten.bitwise_and.Scalar, (WHOLE, 255)),
        (aten.bitwise_or.Tensor, (WHOLE, WHOLE)),
        (aten.__rshift__.Scalar, (WHOLE, 16)),
        (aten.__lshift__.Scalar, (WHOLE, 16)),
        (aten.cat.default, ([A, A, on_meta(1, 4)],)),
        (aten.cat.default, ([A, on_meta(3, 2)], 1)),
        (aten.cat.default, ([A, on_meta(3, 2)], -1)),
        (aten.linalg_vector_norm.default, (B,)),
        (aten.linalg_vector_norm.default, (B, 2.0)),
    ],
)
def test_a_quick_result_is_torchs(func, args):
    found, expected = quick_result(func, args, {}), func(*args)
    assert found is not None and found.is_meta
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mul.Tensor, (A.T, A.T)),  # the result lies as they do
        (aten.mul.Tensor, (A, on_meta(4, 3).T)),
        (aten.add.Tensor, (torch.ones(3, 4), torch.ones(3, 4))),  # real
        (aten.div.Tensor, (WHOLE, WHOLE)),  # another type
        (aten.cat.default, ([A, B],)),
        (aten.cat.default, ([A.T, A.T],)),
        (aten.mm.default, (A, A.T)),
        (aten.linalg_vector_norm.default, (B, 2.0, [1])),
    ],
)
def test_anything_else_is_left_to_torch(func, args):
    assert quick_result(func, args, {}) is None
