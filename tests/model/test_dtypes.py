"""Every row of the table of number types, and the devices that it is read for."""

import pytest
import torch

from qlora_lite.errors import UserError
from qlora_lite.model.dtypes import choose_device, choose_types

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.fixture
def card(monkeypatch):
    def pretend(capability):
        monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Test Card")

    return pretend


@pytest.mark.parametrize(
    ("asked", "device", "capability", "compute", "factors", "scale_loss", "reason"),
    [
        ("auto", "cpu", None, BF16, BF16, False, "bf16: the CPU computes in bf16"),
        ("auto", "cuda", AMPERE, BF16, BF16, False, "bf16: the card (SM 8.0) computes in bf16"),
        ("auto", "cuda", HOPPER, BF16, BF16, False, "bf16: the card (SM 9.0) computes in bf16"),
        ("auto", "cuda", TURING, FP16, FP32, True, "fp16: the card (SM 7.5) has no bf16"),
        ("fp16", "cuda", AMPERE, FP16, FP32, True, "fp16: asked for"),
        ("fp32", "cuda", TURING, FP32, FP32, False, "fp32: asked for"),
        ("fp32", "cpu", None, FP32, FP32, False, "fp32: asked for"),
        ("bf16", "cpu", None, BF16, BF16, False, "bf16: asked for"),
    ],
)
def test_each_row_of_the_table(card, asked, device, capability, compute, factors, scale_loss, reason):
    card(capability)
    types = choose_types(asked, device)
    assert (types.compute, types.factors, types.scale_loss, types.reason) == (compute, factors, scale_loss, reason)
    assert types.name == {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[compute]


def test_bf16_on_a_card_without_it_is_refused_and_says_what_to_use(card):
    card(TURING)
    with pytest.raises(UserError, match=r"model\.dtype: the card \(SM 7\.5\) has no bf16\. Use .*auto, fp16 or fp32"):
        choose_types("bf16", "cuda")


@pytest.mark.parametrize(
    ("asked", "capability", "expected"),
    [
        ("cpu", AMPERE, ("cpu", "cpu: asked for")),
        ("auto", AMPERE, ("cuda", "cuda: Test Card")),
        ("cuda", AMPERE, ("cuda", "cuda: asked for")),
        ("auto", None, ("cpu", "cpu: torch finds no CUDA device")),
    ],
)
def test_a_device_is_chosen_with_its_reason(card, asked, capability, expected):
    card(capability)
    assert choose_device(asked) == expected


def test_cuda_where_there_is_none_is_refused(card):
    card(None)
    with pytest.raises(UserError, match=r"torch finds no CUDA device\. Use device: cpu or auto"):
        choose_device("cuda")
