"""`eval --scales`: score a run with its change at several scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.evaluation import EvalResult
from qlora_lite.runs.adapters import Blend, open_source


@dataclass(frozen=True)
class AtScale:
    """The scores with the change at one scale."""

    scale: float
    result: EvalResult

    def to_json_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, **self.result.to_json_dict()}


@dataclass(frozen=True)
class Scales:
    """The scores at every scale."""

    lines: tuple[AtScale, ...]

    @property
    def best(self) -> AtScale:
        """The scale with the lowest loss."""
        return min(self.lines, key=lambda line: line.result.loss)

    def to_json_dict(self) -> dict[str, Any]:
        return {"scales": [line.to_json_dict() for line in self.lines], "best_scale": self.best.scale}


def evaluate_scales(
    run_dir: Path,
    scales: Sequence[float],
    *,
    data: Path | None,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> Scales:
    """Loss, exact match and F1 with the change at each scale: 0 is the base, 1 the trained change."""
    if not scales or not all(map(math.isfinite, scales)):
        raise UserError("--scales: expected numbers, such as 0,0.5,1,1.5")
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    api.run_base(plan, run)
    with show.phase("loading the base and the adapter"):
        blend = Blend(plan, {"adapter": open_source(run_dir).read()})
    scored = Scales(
        tuple(
            AtScale(scale, score(plan, blend.use({"adapter": scale}), f"scale {scale:g}", data=data))
            for scale in scales
        )
    )
    best = scored.best.scale
    show.show_scales([(line.scale, line.result.loss, line.result.exact_match, line.result.f1) for line in scored.lines])
    show.say(f"the loss is lowest at scale {best:g}" + ("" if best == 1 else "; set it with --set merge.scale=..."))
    return scored
