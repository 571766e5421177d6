"""Stochastic rounding: to a neighbour, right on average, exact on the grid, reproducible."""

import pytest
import torch

from qlora_lite.merging.rounding import make_rounder


def rounded(values, *, name="w", dtype=torch.bfloat16, rounding="stochastic", seed=0):
    return make_rounder(name, dtype=dtype, rounding=rounding, seed=seed)(values.clone())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-6])
def test_every_value_goes_to_one_of_its_two_neighbours(dtype, size):
    values = torch.randn(100_000) * size
    nearest = values.to(dtype)
    result = rounded(values, dtype=dtype)
    step = (values.abs() * torch.finfo(dtype).eps).clamp(
        min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    assert bool(((result.float() - values).abs() <= step).all())
    assert 0.05 < float((result != nearest).float().mean()) < 0.45


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0012345, -0.0300456, 1.7e-5, -3.1e-6])
def test_the_mean_of_many_roundings_is_the_value(dtype, value):
    values = torch.full((400_000,), value)
    result = rounded(values, dtype=dtype).float()
    low, high = result.min().item(), result.max().item()
    assert low < value < high or low == high == torch.tensor(value).item()
    spread = (high - low) / 2 / 400_000**0.5  # at most, one standard deviation of the mean
    assert abs(result.double().mean().item() - torch.tensor(value).item()) <= 5 * spread + abs(value) * 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_on_the_grid_stay_what_they_are(dtype):
    values = torch.cat([torch.randn(10_000), torch.randn(10_000) * 1e-5, torch.zeros(5)]).to(dtype)
    assert torch.equal(rounded(values.float(), dtype=dtype), values)


def test_infinity_and_nan_stay_and_values_around_them_are_rounded():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded(values, dtype=dtype)[[0, 1, 3]], values.to(dtype)[[0, 1, 3]])
        assert bool(rounded(values, dtype=dtype)[2].isnan())
    assert bool(rounded(torch.full((100,), 65519.9), dtype=torch.float16).isinf().any())


def test_the_same_seed_and_name_give_the_same_values_however_the_blocks_are_cut():
    values = torch.randn(40, 32)
    whole = rounded(values)
    in_blocks = make_rounder("w", dtype=torch.bfloat16, rounding="stochastic", seed=0)
    assert torch.equal(torch.cat([in_blocks(block) for block in values.clone().split(7)]), whole)
    assert torch.equal(rounded(values), whole)
    assert not torch.equal(rounded(values, seed=1), whole)
    assert not torch.equal(rounded(values, name="v"), whole)


def test_nearest_and_fp32_are_what_they_say():
    values = torch.randn(1000)
    assert torch.equal(rounded(values, rounding="nearest"), values.bfloat16())
    assert torch.equal(rounded(values, rounding="nearest", dtype=torch.float16), values.half())
    assert torch.equal(rounded(values, dtype=torch.float32), values)


def test_the_random_bits_never_change_between_versions():
    """Merges of old runs stay reproducible: these values were written down once."""
    values = torch.linspace(0.1001, 0.1004, 8)
    assert (rounded(values) > 0.1003).tolist() == [False, False, False, False, True, False, False, False]
