"""Every row of the table of number types, and the devices that it is read for."""

import pytest
import torch

from qlora_lite.device import accelerator
from qlora_lite.device.accelerator import choose_device, cpu_multiplies_bf16
from qlora_lite.device.card import CPU, Card
from qlora_lite.errors import UserError
from qlora_lite.model import dtypes
from qlora_lite.model.dtypes import choose_types, types_of_run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


def card_of(capability: tuple[int, int] | None) -> Card:
    return CPU if capability is None else Card("Test Card", "cuda", 16 * 2**30, capability)


@pytest.mark.parametrize(
    ("asked", "capability", "compute", "factors", "scale_loss", "reason"),
    [
        ("auto", None, BF16, BF16, False, "the CPU computes in bf16"),
        ("auto", AMPERE, BF16, BF16, False, "the card (Test Card (SM 8.0)) computes in bf16"),
        ("auto", HOPPER, BF16, BF16, False, "the card (Test Card (SM 9.0)) computes in bf16"),
        ("auto", TURING, FP16, FP32, True, "the card (Test Card (SM 7.5)) has no bf16"),
        ("fp16", AMPERE, FP16, FP32, True, "asked for"),
        ("fp32", TURING, FP32, FP32, False, "asked for"),
        ("fp32", None, FP32, FP32, False, "asked for"),
        ("bf16", None, BF16, BF16, False, "asked for"),
    ],
)
def test_each_row_of_the_table(monkeypatch, asked, capability, compute, factors, scale_loss, reason):
    monkeypatch.setattr(dtypes, "cpu_multiplies_bf16", lambda: True)
    types = choose_types(asked, card_of(capability))
    assert (types.compute, types.factors, types.scale_loss, types.reason) == (compute, factors, scale_loss, reason)
    assert types.name == {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[compute]


def test_a_cpu_without_bf16_products_computes_in_fp32_unless_bf16_is_asked_for(monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_multiplies_bf16", lambda: False)
    types = choose_types("auto", CPU)
    assert (types.compute, types.factors, types.scale_loss) == (FP32, FP32, False)
    assert types.reason == "the CPU has no instructions that multiply bf16"
    assert choose_types("bf16", CPU).compute is BF16
    assert choose_types("auto", card_of(AMPERE)).compute is BF16


@pytest.mark.parametrize(
    ("converts", "machine", "avx512_bf16", "amx", "expected"),
    [
        (False, "x86_64", False, False, False),  # AVX2
        (True, "x86_64", False, False, False),  # AVX-512: oneDNN supports bf16 by converting
        (True, "AMD64", True, False, True),
        (True, "x86_64", False, True, True),
        (True, "aarch64", False, False, True),
        (False, "arm64", False, False, False),
    ],
)
def test_which_cpus_multiply_bf16(monkeypatch, converts, machine, avx512_bf16, amx, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: converts)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(accelerator.platform, "machine", lambda: machine)
    assert cpu_multiplies_bf16.__wrapped__() is expected


def test_bf16_on_a_card_without_it_is_refused_and_says_what_to_use():
    with pytest.raises(
        UserError, match=r"model\.dtype: the card \(.*SM 7\.5\)\) has no bf16\. Use .*auto, fp16 or fp32"
    ):
        choose_types("bf16", card_of(TURING))


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_a_run_that_is_opened_elsewhere_keeps_its_types(name):
    types = types_of_run(name)
    assert types.name == name and types.reason == "as the run was trained"
    trained_on = card_of(TURING if name == "fp16" else AMPERE)
    trained = choose_types(name, trained_on)
    assert (types.compute, types.factors, types.scale_loss) == (trained.compute, trained.factors, trained.scale_loss)


@pytest.mark.parametrize(
    ("asked", "capability", "expected"),
    [
        ("cpu", AMPERE, "asked for"),
        ("auto", AMPERE, "Test Card (SM 8.0)"),
        ("cuda", AMPERE, "asked for"),
        ("auto", None, "torch finds no CUDA device"),
    ],
)
def test_a_device_is_chosen_with_its_reason(monkeypatch, asked, capability, expected):
    monkeypatch.setattr(accelerator, "card_here", lambda: None if capability is None else card_of(capability))
    card, reason = choose_device(asked)
    assert reason == expected and card == (CPU if asked == "cpu" else card_of(capability))


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(accelerator, "card_here", lambda: None)
    with pytest.raises(UserError, match=r"torch finds no CUDA device\. Use device: cpu or auto"):
        choose_device("cuda")
