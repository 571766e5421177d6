"""The spectrum of an adapter: the singular values of each module's change, and the best approximation of lower rank.

In: an `Adapter`. Out: a `Spectrum` per module. The change is scaling * B @ A, [out, in]; its singular values come from the thin factors:

    B = Q_B R_B,  A^T = Q_A R_A   (QR)      scaling * R_B R_A^T = U S V^T   (SVD, R x R)      change = (Q_B U) S (Q_A V)^T

so the full matrix is never formed. The best approximation of rank k keeps the k largest singular values: |change - best|^2 is the sum of
the squares of the others (Eckart and Young 1936).

effective rank   exp of the entropy of S / sum(S): the number of directions that carry the change (Roy and Vetterli 2007)
energy rank      the number of largest singular values that hold 50, 90 or 99% of sum(S^2)
overlap          phi = |U_a^T U_b|_F^2 / k of the first k directions of two changes: 1 for the same subspace, about k / width for random
                 ones (LoRA, arXiv 2106.09685, section 7.2)

DoRA also scales every row of the weight, which is not a change of low rank: spectra show its low-rank part, and truncation is refused.
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
        """The last part of the module's name: `q_proj`, `down_proj`, ..."""
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The layer number in its name; None for a module outside the layers."""
        number = re.search(r"\.(\d+)\.", self.module)
        return int(number[1]) if number else None

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(sum(s * s for s in self.singular_values))

    @property
    def effective_rank(self) -> float:
        """From 1 to r; 0 for a zero change."""
        total = sum(self.singular_values)
        shares = [s / total for s in self.singular_values if s > 0] if total > 0 else []
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    def energy_rank(self, share: float) -> int:
        """The number of largest singular values that hold `share` of the sum of squares; 0 for a zero change."""
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
    """The spectrum of each module with factors, in the order of their names."""
    module_spectra = []
    for module, factors in sorted(adapter.factors.items()):
        _, s_R, _ = decomposed(factors)
        module_spectra.append(Spectrum(module, factors.shape, tuple(s_R.tolist())))
    return module_spectra


def decomposed(factors: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """-> left directions [out, R], singular values [R] and right directions [in, R] of scaling * B @ A, in fp64.

    A change within the rounding error of B @ A counts as zero, such as an adapter minus itself.
    """
    q_b_OR, r_b_RR = torch.linalg.qr(factors.b_OR.double())
    q_a_IR, r_a_RR = torch.linalg.qr(factors.a_RI.double().T)
    u_RR, s_R, v_RR = torch.linalg.svd(factors.scaling * r_b_RR @ r_a_RR.T)
    rounding = _ROUNDING * abs(factors.scaling) * r_b_RR.norm() * r_a_RR.norm()
    s_R = s_R.where(s_R > rounding, torch.zeros_like(s_R))
    return q_b_OR @ u_RR, s_R, q_a_IR @ v_RR.T


def truncated(factors: LoraFactors, rank: int) -> LoraFactors:
    """The best rank-`rank` approximation of a module's change, as balanced fp32 factors with scaling 1. Raises ModelError for DoRA."""
    if factors.magnitude_O is not None:
        raise ModelError(
            "DoRA rescales whole rows, so its change is not of low rank and cannot be truncated. Merge it instead"
        )
    left_OR, s_R, right_IR = decomposed(factors)
    root_R = s_R[:rank].sqrt()
    return LoraFactors((right_IR[:, :rank] * root_R).T.float().contiguous(), (left_OR[:, :rank] * root_R).float(), 1.0)


def truncated_adapter(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The adapter with each module's change truncated to its rank in `ranks`; modules of rank 0 are omitted. Raises ModelError for DoRA."""
    return replace(
        adapter, factors={name: truncated(f, ranks[name]) for name, f in adapter.factors.items() if ranks[name] > 0}
    )


def ranks_of_equal(module_spectra: Iterable[Spectrum], rank: int) -> dict[str, int]:
    """The same rank for every module, or its own rank if that is lower."""
    return {spectrum.module: min(rank, spectrum.r) for spectrum in module_spectra}


def ranks_of_budget(module_spectra: Iterable[Spectrum], num_parameters: int) -> dict[str, int]:
    """The ranks that keep the most of all changes with at most `num_parameters`: the largest s^2 per parameter first.

    A direction of a module costs in_features + out_features parameters. The directions of a module are taken in order, so each module
    gets its best approximation.
    """
    module_spectra = list(module_spectra)
    offers = [(s * s / sum(spectrum.shape), spectrum) for spectrum in module_spectra for s in spectrum.singular_values]
    ranks, left = {spectrum.module: 0 for spectrum in module_spectra}, num_parameters
    for _, spectrum in sorted(offers, key=lambda offer: -offer[0]):
        if sum(spectrum.shape) <= left:
            ranks[spectrum.module] += 1
            left -= sum(spectrum.shape)
    return ranks


def lost_share(module_spectra: Iterable[Spectrum], ranks: Mapping[str, int]) -> float:
    """|all changes - their approximations| / |all changes|, over all modules together."""
    module_spectra = list(module_spectra)
    whole = sum(spectrum.norm**2 for spectrum in module_spectra)
    lost = sum((spectrum.lost_share(ranks[spectrum.module]) * spectrum.norm) ** 2 for spectrum in module_spectra)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


@dataclass(frozen=True)
class Overlap:
    """The share of the first `k` directions that two adapters have in common, a mean over their common modules."""

    k: int
    inputs: float  # of the directions that the change reads (right singular vectors), 0 to 1
    outputs: float  # of the directions that it writes
    by_chance: float  # expected for random subspaces of these widths
    num_modules: int


def overlaps(left: Adapter, right: Adapter, *, ks: Iterable[int] = (1, 2, 4, 8, 16)) -> list[Overlap]:
    """The overlap for each k that every common module has. A module with a zero change in either adapter is skipped.

    Raises ModelError when no module has a nonzero change in both, or shapes differ.
    """
    common = sorted(left.factors.keys() & right.factors.keys())
    if not common:
        raise ModelError("the two adapters have no module in common, so there is nothing to compare")
    modules = [name for name in common if all(_has_learned(adapter.factors[name]) for adapter in (left, right))]
    if not modules:
        raise ModelError(
            f"none of the {len(common)} modules that the two adapters share has a nonzero change in both (a zero change has no "
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
    return [_mean_overlap(k, phis) for k, phis in sorted(sums.items()) if len(phis) == len(modules)]


def _has_learned(factors: LoraFactors) -> bool:
    return bool(factors.a_RI.any() and factors.b_OR.any())


def _mean_overlap(k: int, phis: list[tuple[float, float, float]]) -> Overlap:
    inputs, outputs, by_chance = (sum(column) / len(phis) for column in zip(*phis, strict=True))
    return Overlap(k, inputs, outputs, by_chance, len(phis))


def _phi(left_NR: Tensor, right_NR: Tensor, k: int) -> float:
    return ((left_NR[:, :k].T @ right_NR[:, :k]).square().sum() / k).item()
