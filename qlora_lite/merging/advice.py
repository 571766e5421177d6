"""From spectra to a recommended rank for each kind of module, and how sure that is.

The rule: as many directions as hold 99% of the energy in nine of ten modules of a kind, rounded up to a power of two. Where that is the
whole rank that was trained, the spectrum has not fallen off and the rank may have been too small: then twice as much is worth a try. Energy
is not quality: a direction that holds little of it may still carry an answer. `rank --to R` measures what a smaller rank costs, and
`rank RECIPE --try 1,4,16` what was learned with each.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.merging.spectrum import ENERGY_SHARES, Spectrum
from qlora_lite.units import format_bytes

_NEARLY_ALL = 0.8  # of the trained rank: the spectrum has not fallen off


@dataclass(frozen=True)
class KindOfModule:
    """All modules of one kind, such as every `q_proj`: medians over them, and the advice for them."""

    kind: str
    num_modules: int
    r: int
    norm: float  # of all their changes together
    effective_rank: float
    energy_ranks: dict[str, int]  # "50%", "90%", "99%" -> median
    recommended_r: int  # 0 where nothing was learned
    how_sure: str


def by_kind(found: Iterable[Spectrum]) -> list[KindOfModule]:
    """The kinds in the order in which a layer has them first."""
    kinds: dict[str, list[Spectrum]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    return [_kind(kind, members) for kind, members in kinds.items()]


def advice(kinds: Sequence[KindOfModule]) -> str:
    """One sentence or two: which rank, and why."""
    if not any(kind.norm for kind in kinds):
        return "this adapter has learned nothing: every change is zero, as before the first step, so no rank can be told from it"
    r = max(kind.r for kind in kinds)
    recommended = max(kind.recommended_r for kind in kinds)
    full = [kind.kind for kind in kinds if kind.recommended_r > kind.r]
    if full:
        return (
            f"r={r} may be too small: in {', '.join(full)} the last directions still carry their share. Try lora.r={recommended}, and "
            "see with `qlora-lite rank RECIPE --try` whether it learns more"
        )
    if recommended < r:
        return (
            f"r={recommended} would hold 99% of the change in nine of ten modules (r={r} was trained). What it costs in answers: "
            f"`qlora-lite rank RUN_DIR --to {recommended}`"
        )
    return f"r={r} fits: its directions are used, and the last ones carry little"


def advice_of_curve(curve: Sequence[Mapping[str, Any]]) -> str:
    """Which of the ranks that were trained to take: the smallest that is not clearly worse than the best. By rank, as `--try` prints them.

    Clearly is more than one standard error of an exact match, or 2% of the loss where there are no answers. Beside it stands how far one
    direction alone came, since rank one is said to do surprisingly well.
    """
    key = "loss" if curve[0]["exact_match"] is None else "exact_match"
    if key == "loss":
        best = min(curve, key=lambda line: line["loss"])
        enough = next(line for line in curve if line["loss"] <= 1.02 * best["loss"])
        how = f"its loss ({enough['loss']:.3f}) is within 2% of the lowest, {best['loss']:.3f} at r={best['r']}"
    else:
        best = max(curve, key=lambda line: line["exact_match"])
        share = best["exact_match"] / 100
        error = 100 * math.sqrt(max(share * (1 - share), 0.25 / best["num_examples"]) / best["num_examples"])
        enough = next(line for line in curve if line["exact_match"] >= best["exact_match"] - error)
        how = (
            f"its exact match ({enough['exact_match']:.1f}) is within one standard error ({error:.1f} points, "
            f"{best['num_examples']} questions) of the best, {best['exact_match']:.1f} at r={best['r']}"
        )
    more = "" if enough["r"] < curve[-1]["r"] else ". It is the largest that was tried: a larger one may be better"
    first = curve[0]
    alone = (
        f". r=1 came to {first[key]:.{3 if key == 'loss' else 1}f}" if first["r"] == 1 and enough is not first else ""
    )
    return f"take r={enough['r']}: {how}; {format_bytes(enough['planned_peak_bytes'])} planned{more}{alone}"


def _kind(kind: str, members: Sequence[Spectrum]) -> KindOfModule:
    r = max(each.r for each in members)
    needed = sorted(each.energy_rank(ENERGY_SHARES[-1]) for each in members)
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
        norm=math.sqrt(sum(each.norm**2 for each in members)),
        effective_rank=_median([each.effective_rank for each in members]),
        energy_ranks={
            f"{share:.0%}": int(_median([each.energy_rank(share) for each in members])) for share in ENERGY_SHARES
        },
        recommended_r=min(recommended, r) if has_fallen else 2 * r,
        how_sure=how_sure,
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
