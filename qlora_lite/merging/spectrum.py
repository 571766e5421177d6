"""What an adapter has learned, as a spectrum: the singular values of each module's change, and the best approximation of lower rank.

In: an `Adapter`. Out: a `Spectrum` a module. The change is scaling * B @ A, [out, in]; its singular values come from the thin factors:

    B = Q_B R_B,  A^T = Q_A R_A   (QR)      scaling * R_B R_A^T = U S V^T   (SVD, R x R)      change = (Q_B U) S (Q_A V)^T

so the full matrix is never formed. The best approximation of rank k keeps the k largest, and misses the rest: |change - best|^2 is the sum
of the squares of what is left out (Eckart and Young 1936).

effective rank   exp of the entropy of S / sum(S): how many directions carry the change (Roy and Vetterli 2007)
energy rank      how many of the largest hold 50, 90 or 99% of sum(S^2)
overlap          phi = |U_a^T U_b|_F^2 / k of the first k directions of two changes: 1 the same subspace, about k / width for random ones
                 (LoRA, arXiv 2106.09685, section 7.2)

DoRA also rescales every row of the weight, which is not of low rank: here its low-rank part is looked at, and truncating it is refused.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_lite.errors import ModelError
from qlora_lite.merging.lora import Adapter, LoraFactors

ENERGY_SHARES = (0.5, 0.9, 0.99)


_ROUNDING = 1e-14  # of fp64 products and decompositions, relative to the norms of the factors


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one module's change, largest first."""

    module: str
    shape: tuple[int, int]  # of the weight: out_features, in_features
    singular_values: tuple[float, ...]

    @property
    def r(self) -> int:
        return len(self.singular_values)

    @property
    def kind(self) -> str:
        """`q_proj`, `down_proj`, ...: what modules of all layers have in common."""
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number in its name; None for a module outside of the layers."""
        found = re.search(r"\.(\d+)\.", self.module)
        return int(found[1]) if found else None

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(sum(s * s for s in self.singular_values))

    @property
    def effective_rank(self) -> float:
        """From 1 to r; 0 for a change that is zero."""
        total = sum(self.singular_values)
        shares = [s / total for s in self.singular_values if s > 0] if total > 0 else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    def energy_rank(self, share: float) -> int:
        """How many of the largest singular values hold `share` of the sum of their squares; 0 for a change that is zero."""
        wanted, held = share * self.norm**2, 0.0
        for count, s in enumerate(self.singular_values, 1):
            held += s * s
            if held >= wanted * (1 - 1e-9) and self.norm > 0:
                return count
        return self.r if self.norm > 0 else 0

    def lost_share(self, rank: int) -> float:
        """|change - its best approximation of `rank`| / |change|."""
        left = sum(s * s for s in self.singular_values[rank:])
        return math.sqrt(left) / self.norm if self.norm > 0 else 0.0


def spectra(adapter: Adapter) -> list[Spectrum]:
    """One for each module with factors, in the order of their names."""
    found = []
    for module, factors in sorted(adapter.factors.items()):
        _, s_R, _ = decomposed(factors)
        found.append(Spectrum(module, factors.shape, tuple(s_R.tolist())))
    return found


def decomposed(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """-> left directions [out, R], singular values [R] and right directions [in, R] of scaling * B @ A, in fp64.

    A change no larger than the rounding error of B @ A counts as zero: an adapter minus itself leaves only that.
    """
    q_b_OR, r_b_RR = torch.linalg.qr(factors.b_OR.double())
    q_a_IR, r_a_RR = torch.linalg.qr(factors.a_RI.double().T)
    u_RR, s_R, v_RR = torch.linalg.svd(factors.scaling * r_b_RR @ r_a_RR.T)
    rounding = _ROUNDING * abs(factors.scaling) * r_b_RR.norm() * r_a_RR.norm()
    s_R = s_R.where(s_R > rounding, torch.zeros_like(s_R))
    return q_b_OR @ u_RR, s_R, q_a_IR @ v_RR.T


def truncated(factors: LoraFactors, rank: int) -> LoraFactors:
    """The best approximation of `rank` of a module's change, as balanced fp32 factors with scaling 1. Raises ModelError for DoRA."""
    if factors.magnitude_O is not None:
        raise ModelError(
            "DoRA rescales whole rows, so its change is not of low rank and cannot be truncated. Merge it instead"
        )
    left_OR, s_R, right_IR = decomposed(factors)
    root_R = s_R[:rank].sqrt()
    return LoraFactors((right_IR[:, :rank] * root_R).T.float().contiguous(), (left_OR[:, :rank] * root_R).float(), 1.0)


def truncated_adapter(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The adapter with each module's change brought to its rank in `ranks`; modules of rank 0 are left out. Raises ModelError."""
    return replace(
        adapter, factors={name: truncated(f, ranks[name]) for name, f in adapter.factors.items() if ranks[name] > 0}
    )


def ranks_of_equal(found: Iterable[Spectrum], rank: int) -> dict[str, int]:
    """The same rank for every module, or its own where that is lower."""
    return {each.module: min(rank, each.r) for each in found}


def ranks_of_budget(found: Iterable[Spectrum], num_parameters: int) -> dict[str, int]:
    """Ranks that keep as much of all changes together as `num_parameters` can: the largest s^2 a parameter first.

    A direction of a module costs in_features + out_features parameters. Each module's directions come in their order, so what is chosen
    is the best of its rank.
    """
    found = list(found)
    offers = [(s * s / sum(each.shape), each) for each in found for s in each.singular_values]
    ranks, left = {each.module: 0 for each in found}, num_parameters
    for _, each in sorted(offers, key=lambda offer: -offer[0]):
        if sum(each.shape) <= left:
            ranks[each.module] += 1
            left -= sum(each.shape)
    return ranks


def lost_share(found: Iterable[Spectrum], ranks: Mapping[str, int]) -> float:
    """|all changes - their approximations| / |all changes|, over all modules together."""
    found = list(found)
    whole = sum(each.norm**2 for each in found)
    lost = sum((each.lost_share(ranks[each.module]) * each.norm) ** 2 for each in found)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


@dataclass(frozen=True)
class Overlap:
    """How much of the first `k` directions of two adapters is in common, over all modules that both have."""

    k: int
    inputs: float  # of what the change reads (right singular vectors), 0 to 1
    outputs: float  # of what it writes
    by_chance: float  # what random subspaces of these widths would have
    num_modules: int


def overlaps(left: Adapter, right: Adapter, *, ks: Iterable[int] = (1, 2, 4, 8, 16)) -> list[Overlap]:
    """For each k that every common module has; one that either adapter leaves as it was has no directions and is passed over.

    Raises ModelError when no module is common to what the two have learned, or one has another shape.
    """
    common = sorted(left.factors.keys() & right.factors.keys())
    if not common:
        raise ModelError("the two adapters have no module in common, so there is nothing to compare")
    modules = [name for name in common if all(_has_learned(each.factors[name]) for each in (left, right))]
    if not modules:
        raise ModelError(
            f"in none of the {len(common)} modules that the two adapters share have both learned something (a change that is zero has no "
            "directions), so there is nothing to compare"
        )
    sums: dict[int, list[tuple[float, float, float]]] = {}
    for module in modules:
        one, other = left.factors[module], right.factors[module]
        if one.shape != other.shape:
            raise ModelError(
                f"{module}: {list(one.shape)} in one adapter, {list(other.shape)} in the other: they are of different models"
            )
        (u_a, _, v_a), (u_b, _, v_b) = decomposed(one), decomposed(other)
        for k in (k for k in ks if k <= min(u_a.shape[1], u_b.shape[1])):
            chance = k / 2 * (1 / one.shape[0] + 1 / one.shape[1])
            sums.setdefault(k, []).append((_phi(v_a, v_b, k), _phi(u_a, u_b, k), chance))
    return [_mean_overlap(k, found) for k, found in sorted(sums.items()) if len(found) == len(modules)]


def _has_learned(factors: LoraFactors) -> bool:
    return bool(factors.a_RI.any() and factors.b_OR.any())


def _mean_overlap(k: int, found: list[tuple[float, float, float]]) -> Overlap:
    inputs, outputs, by_chance = (sum(column) / len(found) for column in zip(*found, strict=True))
    return Overlap(k, inputs, outputs, by_chance, len(found))


def _phi(left_NR: Tensor, right_NR: Tensor, k: int) -> float:
    return ((left_NR[:, :k].T @ right_NR[:, :k]).square().sum() / k).item()
