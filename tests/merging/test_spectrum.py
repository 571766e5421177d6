"""The spectrum of a change, against the dense change itself."""

import math

import pytest
import torch

from qlora_lite.errors import ModelError
from qlora_lite.merging.advice import advice, by_kind
from qlora_lite.merging.lora import Adapter, LoraFactors
from qlora_lite.merging.spectrum import (
    Spectrum,
    lost_share,
    overlaps,
    ranks_of_budget,
    ranks_of_equal,
    spectra,
    truncated,
    truncated_adapter,
)

SHAPES = {"model.layers.0.q_proj": (12, 20), "model.layers.0.down_proj": (30, 9), "model.layers.1.q_proj": (12, 20)}


def random_factors(shape, r, *, scaling=0.5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, shape[1], generator=generator), torch.randn(shape[0], r, generator=generator)
    return LoraFactors(a.to(dtype), b.to(dtype), scaling)


def random_adapter(r=6, seed=0):
    return Adapter({n: random_factors(shape, r, seed=seed + i) for i, (n, shape) in enumerate(SHAPES.items())}, {}, {})


def dense(factors):
    return factors.scaling * factors.b_OR.double() @ factors.a_RI.double()


@pytest.mark.parametrize(("shape", "r"), [((12, 20), 1), ((12, 20), 6), ((30, 9), 9), ((5, 40), 8)])
def test_singular_values_are_those_of_the_dense_change(shape, r):
    factors = random_factors(shape, r)
    [found] = spectra(Adapter({"m": factors}, {}, {}))
    expected = torch.linalg.svdvals(dense(factors))[: found.r]
    torch.testing.assert_close(torch.tensor(found.singular_values[: len(expected)], dtype=torch.float64), expected)
    assert found.norm == pytest.approx(dense(factors).norm().item())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_what_truncating_loses_is_exactly_the_discarded_singular_values(rank):
    factors = random_factors((12, 20), 6)
    [found] = spectra(Adapter({"m": factors}, {}, {}))
    short = truncated(factors, rank)
    assert short.a_RI.shape == (rank, 20) and short.b_OR.shape == (12, rank) and short.scaling == 1.0
    lost = (dense(factors) - dense(short)).norm().item()
    assert lost == pytest.approx(math.sqrt(sum(s * s for s in found.singular_values[rank:])), rel=1e-5)
    assert found.lost_share(rank) == pytest.approx(lost / found.norm, rel=1e-5)


def test_no_other_matrix_of_that_rank_is_closer():
    factors, generator = random_factors((12, 20), 6), torch.Generator().manual_seed(1)
    best = (dense(factors) - dense(truncated(factors, 2))).norm()
    left, _, right = torch.linalg.svd(dense(factors))
    for _ in range(50):
        u = left[:, :2] + 0.1 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
        v = right[:2] + 0.1 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
        other = u @ torch.linalg.lstsq(u, dense(factors)).solution @ torch.linalg.pinv(v) @ v
        assert (dense(factors) - other).norm() >= best


def test_a_full_rank_truncation_changes_nothing():
    factors = random_factors((12, 20), 6, dtype=torch.bfloat16)
    torch.testing.assert_close(dense(truncated(factors, 6)), dense(factors), rtol=1e-5, atol=1e-5)


def test_effective_and_energy_rank_of_known_spectra():
    flat = Spectrum("m", (9, 9), (2.0, 2.0, 2.0, 2.0))
    assert flat.effective_rank == pytest.approx(4) and [flat.energy_rank(x) for x in (0.5, 0.9, 0.99)] == [2, 4, 4]
    steep = Spectrum("m", (9, 9), (10.0, 1.0, 0.1))
    assert steep.energy_rank(0.9) == 1 and steep.energy_rank(0.99) == 1 and steep.energy_rank(0.9999) == 2
    nothing = Spectrum("m", (9, 9), (0.0, 0.0))
    assert nothing.effective_rank == 0 and nothing.energy_rank(0.5) == 0 and nothing.lost_share(1) == 0


def test_a_budget_of_parameters_goes_to_the_directions_that_hold_most_for_their_cost():
    found = [
        Spectrum("a", (10, 10), (3.0, 1.0)),
        Spectrum("b", (10, 10), (2.0, 0.1)),
        Spectrum("c", (50, 50), (4.0, 3.9)),
    ]
    assert ranks_of_budget(found, 20) == {"a": 1, "b": 0, "c": 0}  # 9 / 20 a parameter; c's first 16 / 100
    assert ranks_of_budget(found, 60) == {"a": 2, "b": 1, "c": 0}
    assert ranks_of_budget(found, 10_000) == {"a": 2, "b": 2, "c": 2}


def test_a_global_budget_loses_no_more_than_equal_ranks_of_the_same_size():
    adapter = random_adapter()
    found = spectra(adapter)
    equal = ranks_of_equal(found, 2)
    size = sum(equal[each.module] * sum(each.shape) for each in found)
    budget = ranks_of_budget(found, size)
    assert lost_share(found, budget) <= lost_share(found, equal) * 1.05
    short = truncated_adapter(adapter, budget)
    lost = sum(
        (dense(f) - (dense(short.factors[n]) if n in short.factors else 0)).square().sum()
        for n, f in adapter.factors.items()
    )
    whole = sum(dense(f).square().sum() for f in adapter.factors.values())
    assert lost_share(found, budget) == pytest.approx(math.sqrt(lost / whole), rel=1e-5)


def test_overlap_is_one_with_itself_and_what_chance_gives_with_a_stranger():
    adapter = random_adapter()
    assert all(
        each.inputs == pytest.approx(1) and each.outputs == pytest.approx(1) for each in overlaps(adapter, adapter)
    )
    wide = {"m": (400, 600)}
    pairs = [
        overlaps(
            *(Adapter({n: random_factors(s, 8, seed=seed) for n, s in wide.items()}, {}, {}) for seed in (i, i + 99))
        )
        for i in range(5)
    ]
    of_eight = [each for found in pairs for each in found if each.k == 8]
    assert sum(each.inputs + each.outputs for each in of_eight) / 10 == pytest.approx(of_eight[0].by_chance, rel=0.3)


def test_adapters_without_a_common_module_have_no_overlap():
    with pytest.raises(ModelError, match="no module in common"):
        overlaps(Adapter({"a": random_factors((4, 4), 2)}, {}, {}), Adapter({"b": random_factors((4, 4), 2)}, {}, {}))


def test_dora_cannot_be_truncated():
    with pytest.raises(ModelError, match="DoRA"):
        truncated(LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0, torch.ones(4)), 1)


def test_the_advice_is_less_where_the_spectrum_falls_off_and_more_where_it_does_not():
    steep = [Spectrum(f"layers.{i}.q_proj", (64, 64), tuple(0.1**k for k in range(16))) for i in range(4)]
    flat = [Spectrum(f"layers.{i}.v_proj", (64, 64), (1.0,) * 16) for i in range(4)]
    [q] = by_kind(steep)
    assert (q.kind, q.num_modules, q.r, q.recommended_r) == ("q_proj", 4, 16, 1) and "falls off" in q.how_sure
    assert "r=1 would hold 99%" in advice([q])
    kinds = by_kind([*steep, *flat])
    assert [kind.recommended_r for kind in kinds] == [1, 32] and "Try lora.r=32" in advice(kinds)
