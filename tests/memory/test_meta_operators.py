"""Remembered results are what torch's own meta kernels give: shape, type, strides and storage; views and writes are left to torch."""

import pytest
import torch

from qlora_lite.memory import meta_operators as meta_ops
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.meta_operators import result_of

aten = torch.ops.aten


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


A, B, ROW = on_meta(3, 4), on_meta(3, 4, dtype=torch.float32), on_meta(4)
WHOLE = on_meta(3, 4, dtype=torch.int32)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(meta_ops, "_makers", {})


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, (A, B), {}),
        (aten.add.Tensor, (A, B), {"alpha": 2}),
        (aten.add.Tensor, (WHOLE, 1.5), {}),
        (aten.add.Tensor, (WHOLE, 1), {}),
        (aten.mul.Tensor, (A.T, A.T), {}),  # the result lies as they do
        (aten.mul.Tensor, (on_meta(3, 1), ROW.expand(3, 4)), {}),
        (aten.mm.default, (A, A.T), {}),
        (aten.cat.default, ([A, on_meta(3, 2)], -1), {}),
        (aten.linalg_vector_norm.default, (B, 2.0, [1]), {}),
        (aten._log_softmax.default, (B, 1, False), {}),
        (aten.native_dropout.default, (B, 0.5, True), {}),
        (aten.topk.default, (B, 2), {}),
        (aten._to_copy.default, (A,), {"dtype": torch.float32}),
        (aten.arange.default, (5,), {"device": torch.device("meta")}),
    ],
)
def test_a_remembered_result_is_torchs(func, args, kwargs):
    expected, first, again = (result(func, args, kwargs) for result in (torchs, result_of, result_of))
    assert len(meta_ops._makers) == 1 and all(meta_ops._makers.values()), "nothing was remembered"
    for found in (first, again):
        assert type(found) is type(expected)
        for mine, theirs in zip(as_tuple(found), as_tuple(expected), strict=True):
            assert mine.is_meta and (mine.shape, mine.dtype, mine.stride()) == (
                theirs.shape,
                theirs.dtype,
                theirs.stride(),
            )
            assert mine.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()


def test_equal_numbers_of_unequal_types_are_told_apart():
    types = [result_of(aten.add.Tensor, (WHOLE, number), {}).dtype for number in (1, 1.0, True, 1)]
    assert types == [torch.int32, torch.float32, torch.int32, torch.int32]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.t.default, (A,)),
        (aten.view.default, (A, [12])),
        (aten._unsafe_view.default, (A, [12])),  # does not say that it is a view
        (aten.split.Tensor, (A, 2)),
    ],
)
def test_what_lies_in_an_argument_stays_there(func, args):
    for _ in range(2):
        for each in as_tuple(result_of(func, args, {})):
            assert each.untyped_storage()._cdata == A.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add_.Tensor, (A, B)),
        (aten.copy_.default, (A.T, on_meta(4, 3, dtype=torch.float32))),
        (aten.masked_fill_.Scalar, (B, on_meta(3, 4, dtype=torch.bool), 0.0)),
    ],
)
def test_what_is_written_into_is_the_result(func, args):
    assert all(result_of(func, args, {}) is args[0] for _ in range(2))
    assert all(meta_ops._makers.values()), "nothing was remembered"


def test_what_looks_otherwise_afterwards_is_left_to_torch():
    for _ in range(2):
        turned = on_meta(3, 4)
        assert result_of(aten.t_.default, (turned,), {}) is turned and turned.shape == (4, 3)


def test_real_tensors_are_computed():
    for number in (1.0, 2.0):
        assert result_of(aten.mul.Tensor, (torch.ones(2), number), {}).tolist() == [number, number]
        assert result_of(aten.zeros.default, ([2],), {}).tolist() == [0.0, 0.0]


def test_a_ledger_counts_the_same_with_and_without_memory(monkeypatch):
    def peak() -> int:
        net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)
        ).to("meta")
        with Ledger() as ledger:
            torch.nn.functional.cross_entropy(
                net(on_meta(5, 8, dtype=torch.float32)), on_meta(5, dtype=torch.int64)
            ).backward()
        return ledger.peak_bytes

    with_memory = [peak() for _ in range(2)]
    monkeypatch.setattr("qlora_lite.memory.ledger.result_of", torchs)
    assert with_memory == [peak()] * 2


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(meta_ops, "_MOST", 3)
    for size in range(1, 10):
        result_of(aten.neg.default, (on_meta(size),), {})
    assert 1 <= len(meta_ops._makers) <= 3


def torchs(func, args, kwargs):
    return func(*args, **kwargs)


def as_tuple(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)
