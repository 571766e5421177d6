"""From spectra to a recommended rank for each kind of module, with its certainty.

The rule: the number of directions that hold 99% of the energy in nine of ten modules of a kind, rounded up to a power of two. If that is
the whole trained rank, the spectrum has not fallen off and the rank may have been too small: then twice the rank is worth a try. Energy
is not quality: a direction of low energy may still carry an answer. `rank --to R` measures the cost of a smaller rank, and
`rank RECIPE --try 1,4,16` compares trained ranks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_lite.merging.spectrum import ENERGY_SHARES, Spectrum
from qlora_lite.units import format_bytes

_NEARLY_ALL = 0.8  # of the trained rank: the spectrum has not fallen off


@dataclass(frozen=True)
class KindOfModule:
    """All modules of one kind, such as every `q_proj`: medians, and the advice."""

    kind: str
    num_modules: int
    r: int
    norm: float  # of all their changes combined
    effective_rank: float
    energy_ranks: dict[str, int]  # "50%", "90%", "99%" -> median
    recommended_r: int  # 0 where nothing was learned
    how_sure: str


def by_kind(spectra: Iterable[Spectrum]) -> list[KindOfModule]:
    """Summarize each kind, in the order of a layer's modules."""
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    return [_kind(kind, members) for kind, members in kinds.items()]


def advice(kinds: Sequence[KindOfModule]) -> str:
    """The recommended rank with its reason, in one or two sentences."""
    if not any(kind.norm for kind in kinds):
        return "this adapter has learned nothing: every change is zero, as before the first step, so there is no rank to recommend"
    r = max(kind.r for kind in kinds)
    recommended = max(kind.recommended_r for kind in kinds)
    full = [kind.kind for kind in kinds if kind.recommended_r > kind.r]
    if full:
        return (
            f"r={r} may be too small: in {', '.join(full)} the last directions still matter. Try lora.r={recommended}, and "
            "compare with `qlora-lite rank RECIPE --try`"
        )
    if recommended < r:
        return (
            f"r={recommended} would hold 99% of the change in nine of ten modules (r={r} was trained). Measure its cost in answers: "
            f"`qlora-lite rank RUN_DIR --to {recommended}`"
        )
    return f"r={r} fits: all its directions are used, and the last ones hold little"


@dataclass(frozen=True)
class TrainedRank:
    """The scores of a model that was trained with one rank."""

    r: int
    planned_peak_bytes: int
    num_examples: int  # scored
    loss: float
    exact_match: float | None  # None for plain text


def advice_of_curve(curve: Sequence[TrainedRank]) -> str:
    """Recommend one of the trained ranks: the smallest that is not clearly worse than the best. `curve` is sorted by rank.

    "Clearly" means more than one standard error of the exact match, or 2% of the loss without answers. The advice also quotes the result
    of rank 1, which often does surprisingly well.
    """
    matches = [line.exact_match for line in curve if line.exact_match is not None]
    if len(matches) < len(curve):
        best = min(curve, key=lambda line: line.loss)
        enough = next(line for line in curve if line.loss <= 1.02 * best.loss)
        why = f"its loss ({enough.loss:.3f}) is within 2% of the lowest, {best.loss:.3f} at r={best.r}"
        reached = f"{curve[0].loss:.3f}"
    else:
        most = max(matches)
        best, share = curve[matches.index(most)], most / 100
        error = 100 * math.sqrt(max(share * (1 - share), 0.25 / best.num_examples) / best.num_examples)
        position = next(i for i, match in enumerate(matches) if match >= most - error)
        enough = curve[position]
        why = (
            f"its exact match ({matches[position]:.1f}) is within one standard error ({error:.1f} points, "
            f"{best.num_examples} questions) of the best, {most:.1f} at r={best.r}"
        )
        reached = f"{matches[0]:.1f}"
    more = "" if enough.r < curve[-1].r else ". It is the largest rank tried; a larger one may be better"
    alone = f". r=1 reached {reached}" if curve[0].r == 1 and enough is not curve[0] else ""
    return f"take r={enough.r}: {why}; {format_bytes(enough.planned_peak_bytes)} planned{more}{alone}"


def _kind(kind: str, members: Sequence[Spectrum]) -> KindOfModule:
    r = max(member.r for member in members)
    needed = sorted(member.energy_rank(ENERGY_SHARES[-1]) for member in members)
    most = needed[math.ceil(0.9 * len(needed)) - 1]
    recommended = 1 << max(0, most - 1).bit_length() if most else 0
    has_fallen = most <= _NEARLY_ALL * r
    spread = f"{needed[0]} to {needed[-1]} directions hold 99% in its {len(members)} modules"
    if not needed[-1]:
        how_sure = f"nothing was learned: every change of its {len(members)} modules is zero"
    elif has_fallen:
        how_sure = f"the spectrum falls off: {spread}"
    else:
        how_sure = f"the spectrum has not fallen off, so this is a guess: {spread}"
    return KindOfModule(
        kind=kind,
        num_modules=len(members),
        r=r,
        norm=math.sqrt(sum(member.norm**2 for member in members)),
        effective_rank=_median([member.effective_rank for member in members]),
        energy_ranks={
            f"{share:.0%}": int(_median([member.energy_rank(share) for member in members])) for share in ENERGY_SHARES
        },
        recommended_r=min(recommended, r) if has_fallen else 2 * r,
        how_sure=how_sure,
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
