"""The share of an adapter's effect that another form of it loses: a lower rank, fewer bits. Like the proof of a merge (proof.py).

The base, the adapter and the other adapter run in fp32 on held-out rows, one weight in memory at a time. The comparison is of
log-probabilities [N, V] at the N label positions, by Frobenius norm:

    effect = |adapter - base|        lost = |other - adapter| / effect
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_lite.merging.proof import LOG_PROB_BYTES, Models, full_fp32, plain_config, require_finite
from qlora_lite.merging.write import open_pair

if TYPE_CHECKING:
    from qlora_lite.data.template import Encoded


@dataclass(frozen=True)
class EffectLost:
    """`adapter_effect` is in nats; `lost_share` is a share of it (0.0 where it is 0)."""

    adapter_effect: float
    lost_share: float
    equal_greedy_share: float  # share of label positions where both prefer the same token
    num_rows: int
    num_label_tokens: int


def effect_lost(
    base_dir: Path | str,
    adapter_dir: Path | str,
    other_dir: Path | str,
    encoded_rows: "Sequence[Encoded]",
    *,
    compute_dtype: str | None = "bf16",
    device: str = "cpu",
) -> EffectLost:
    """Compare the adapter at `other_dir` with the one at `adapter_dir`, both on one base. Raises ModelError, ProofFailed."""
    with torch.no_grad(), full_fp32():
        first, second = (
            Models(base, adapter, base, config=plain_config(base), scale=1.0, device=device)  # reads no merged files
            for base, adapter in (
                open_pair(base_dir, folder, compute_dtype=compute_dtype) for folder in (adapter_dir, other_dir)
            )
        )
        first_states = {variant: first.predictors(variant, encoded_rows) for variant in ("base", "adapter")}
        second_states = {"adapter": second.predictors("adapter", encoded_rows)}
        sums = {"effect": 0.0, "lost": 0.0, "equal_greedy": 0.0}
        vocabulary, count = first.vocabulary, second_states["adapter"].shape[0]
        step = max(1, LOG_PROB_BYTES // (4 * vocabulary * 3))
        for start in range(0, count, step):
            plain, adapted = (
                values.log_softmax(-1)
                for values in first.logits(_positions(first_states, start, step), vocabulary).values()
            )
            (other,) = (
                values.log_softmax(-1)
                for values in second.logits(_positions(second_states, start, step), vocabulary).values()
            )
            require_finite(other, "adapter", "the head")
            sums["effect"] += (adapted - plain).square_().sum(dtype=torch.float64).item()
            sums["lost"] += (other - adapted).square_().sum(dtype=torch.float64).item()
            sums["equal_greedy"] += float((other.argmax(-1) == adapted.argmax(-1)).sum())
    effect = math.sqrt(sums["effect"])
    return EffectLost(
        adapter_effect=effect,
        lost_share=math.sqrt(sums["lost"]) / effect if effect else 0.0,
        equal_greedy_share=sums["equal_greedy"] / count,
        num_rows=len(encoded_rows),
        num_label_tokens=count,
    )


def _positions(states: dict[str, torch.Tensor], start: int, step: int) -> dict[str, torch.Tensor]:
    return {variant: final[start : start + step] for variant, final in states.items()}
