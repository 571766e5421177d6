"""AdamW on bf16 factors: small steps are kept, bytes are known, and it is AdamW."""

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.training.optimizer import (
    OPTIMIZERS,
    STATE_TENSORS,
    join,
    make_optimizer,
    set_learning_rate,
    split,
    state_bytes,
)
from qlora_lite.training.state import TrainState
from qlora_lite.training.step import forward_backward
from tests.tiny_model import random_rows, split_batches, tiny_adapted

BF16, FP32 = torch.bfloat16, torch.float32


def parameter(*shape, dtype=BF16, scale=0.05):
    value = torch.nn.Parameter((torch.randn(*shape) * scale).to(dtype))
    value.grad_dtype = FP32
    return value


def named(*parameters):
    return [(f"factor_{index}", parameter) for index, parameter in enumerate(parameters)]


def run(model, batches, *, num_steps, optimizer, learning_rate=2e-4):
    """-> loss of every step; the same gradient code that training runs, full batch."""
    losses = []
    for _ in range(num_steps):
        losses.append(forward_backward(model, batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def exact_value(parameter, optimizer):
    """The fp32 value that the optimizer follows."""
    low = optimizer.state[parameter].get("low_bits")
    return parameter.detach().clone() if low is None else join(parameter.detach(), low)


def factors_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained(factors_dtype, *, optimizer_of=None, num_steps=40):
    """-> (losses, exact factors as one fp32 vector) after `num_steps` on the same few rows."""
    model = tiny_adapted(factors=factors_dtype)
    model.train()
    make = optimizer_of or (
        lambda factors: make_optimizer(named(*factors), name="adamw", learning_rate=2e-4, weight_decay=0.0)
    )
    optimizer = make(factors_of(model))
    losses = run(model, split_batches(random_rows([4] * 4), 1), num_steps=num_steps, optimizer=optimizer)
    vector = [exact_value(p, optimizer) for p in factors_of(model)]
    return losses, torch.cat([part.detach().flatten() for part in vector])


def test_bf16_factors_reach_the_loss_that_fp32_factors_reach():
    start = torch.cat([p.detach().float().flatten() for p in factors_of(tiny_adapted())])
    exact_losses, exact = trained(FP32)
    kept_losses, kept = trained(BF16)
    _, plain = trained(
        BF16, optimizer_of=lambda factors: bitsandbytes.optim.AdamW32bit(factors, lr=2e-4, weight_decay=0.0)
    )
    progress = exact_losses[0] - exact_losses[-1]
    assert progress > 0.1
    assert abs(kept_losses[-1] - exact_losses[-1]) < 0.01 * progress
    way = (exact - start).norm()
    kept_error, plain_error = (kept - exact).norm() / way, (plain - exact).norm() / way
    assert kept_error < 0.02
    assert plain_error > 0.1  # what bf16 alone would lose


def test_updates_far_below_a_bf16_step_add_up():
    """1,000 updates of 1e-5 from 0.05, where the bf16 grid is 2.4e-4 wide: plain bf16 would stay where it is."""
    weight = parameter(16, 16)
    weight.data.fill_(0.05)
    start = weight.detach().float().clone()
    optimizer = make_optimizer(named(weight), name="adamw", learning_rate=1e-5, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones(16, 16)
        optimizer.step()
    moved = start - exact_value(weight, optimizer)
    torch.testing.assert_close(moved, torch.full((16, 16), 0.01), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_weights_follow_fp32_training_to_the_bit(name):
    weight = parameter(64, 128)
    optimizer = make_optimizer(named(weight), name=name, learning_rate=1e-3, weight_decay=0.1)
    exact = torch.nn.Parameter(weight.detach().float())
    kinds = {"paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit", "adamw": "AdamW32bit"}
    reference = getattr(bitsandbytes.optim, kinds[name])([exact], lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(64, 128)
        weight.grad, exact.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(exact_value(weight, optimizer), exact)
        assert ((weight - exact).abs() <= exact.abs() * 2**-8).all() and weight.dtype == BF16


def test_the_two_halves_of_an_fp32_value_are_the_whole():
    values = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-30, torch.tensor([0.0, -0.0, 1.0, -3.3e38, 1e-45])])
    ties = (torch.randn(1000).view(torch.int32) & ~0xFFFF | 0x8000).view(
        torch.float32
    )  # half way between two bf16 values
    for exact in (values, -values, ties):
        high, low = split(exact)
        assert (high.dtype, low.dtype) == (BF16, torch.int16)
        assert torch.equal(join(high, low).view(torch.int32), exact.view(torch.int32))
        is_tie = low == -0x8000
        assert torch.equal(high[~is_tie], exact.bfloat16()[~is_tie])


@pytest.mark.parametrize(("name", "limit"), [("adamw", 1e-6), ("paged_adamw_32bit", 1e-6), ("paged_adamw_8bit", 0.05)])
def test_it_is_torchs_adamw(name, limit):
    weight = parameter(64, 128, dtype=FP32)
    start = weight.detach().clone()
    reference = torch.nn.Parameter(start.clone())
    ours = make_optimizer(named(weight), name=name, learning_rate=1e-3, weight_decay=0.1)
    theirs = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.1)
    for _ in range(10):
        weight.grad = torch.randn(64, 128)
        reference.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    assert (weight - reference).norm() < limit * (reference - start).norm() + 1e-5


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_are_exact(name, dtype):
    large, small = (64, 128), (16, 64)  # 8-bit state from 4,096 weights up
    optimizer = make_optimizer(
        named(parameter(*large, dtype=dtype), parameter(*large, dtype=dtype), parameter(*small, dtype=dtype)),
        name=name,
        learning_rate=1e-3,
        weight_decay=0.0,
    )
    n_large, n_small = 2 * 64 * 128, 16 * 64
    low_bits = 2 * (n_large + n_small) if dtype == BF16 else 0
    if name == "paged_adamw_8bit":
        blocks = n_large // 256
        maps = 2 * 256 * 4  # one signed and one unsigned map, shared by all
        expected = 2 * n_large + 2 * 4 * blocks + maps + 8 * n_small
    else:
        expected = 8 * (n_large + n_small)
    assert state_bytes(optimizer) == (expected + low_bits, 0)


def test_8_bit_maps_are_shared_and_not_saved(tmp_path):
    model = tiny_adapted(r=64)
    optimizer = make_optimizer(model.named_parameters(), name="paged_adamw_8bit", learning_rate=1e-3, weight_decay=0.0)
    states = [state for state in optimizer.state.values() if "qmap1" in state]
    assert len(states) > 1
    assert {id(state["qmap1"]) for state in states} == {id(states[0]["qmap1"])}
    TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False)).save(tmp_path, base=tmp_path)
    saved = {name.rpartition("/")[2] for name in load_file(tmp_path / "state.safetensors")}
    assert saved == {*STATE_TENSORS, "cpu"}


def test_only_what_trains_gets_state():
    frozen = parameter(8, 8).requires_grad_(False)
    optimizer = make_optimizer(named(frozen, parameter(8, 8)), name="adamw", learning_rate=1e-3, weight_decay=0.0)
    assert len(optimizer.state) == 1


def factor_updates(*, ratio, factors, learning_rate=1e-4):
    """Factor name -> what one step adds to it, with the remainder, in fp32."""
    model = tiny_adapted(factors=factors)
    model.train()
    before = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(
        model.named_parameters(), name="adamw", learning_rate=learning_rate, weight_decay=0.0, loraplus_ratio=ratio
    )
    run(model, split_batches(random_rows([4] * 4), 1), num_steps=1, optimizer=optimizer)
    return {name: exact_value(p, optimizer) - before[name] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("factors", [FP32, BF16])
def test_with_loraplus_b_moves_16_times_as_far_in_the_first_step_and_a_as_far_as_without(factors):
    plain, plus = factor_updates(ratio=1.0, factors=factors), factor_updates(ratio=16.0, factors=factors)
    assert plain.keys() == plus.keys() and any("lora_B" in name for name in plain)
    for name, update in plus.items():
        if "lora_A" in name:
            assert torch.equal(update, plain[name]), name
        else:  # as exact as adding 1e-4 to a factor of 0.05 in 16 (two halves of bf16) or 24 bits is
            limit = 2e-6 if factors == BF16 else 2e-7
            torch.testing.assert_close(update, 16 * plain[name], rtol=0, atol=16 * limit)
            assert update.abs().max() > 1e-3


def test_the_schedule_multiplies_both_rates():
    model = tiny_adapted()
    optimizer = make_optimizer(
        model.named_parameters(), name="adamw", learning_rate=1e-3, weight_decay=0.1, loraplus_ratio=4.0
    )
    set_learning_rate(optimizer, 5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained_names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(rates) == len(trained_names)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == (2e-3 if "lora_B" in name else 5e-4), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
