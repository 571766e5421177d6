"""`eval --scales`: score a run with its change at several scales."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.runs.adapters import Blend, open_source


def evaluate_scales(
    run_dir: Path,
    scales: Sequence[float],
    *,
    data: Path | None,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> dict[str, Any]:
    """Loss, exact match and F1 with the change at each scale: 0 is the base, 1 the trained change."""
    if not scales or not all(map(math.isfinite, scales)):
        raise UserError("--scales: expected numbers, such as 0,0.5,1,1.5")
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    api.run_base(plan, run)
    with show.phase("loading the base and the adapter"):
        blend = Blend(plan, {"adapter": open_source(run_dir).read()})
    lines: list[dict[str, Any]] = []
    for scale in scales:
        result = score(plan, blend.use({"adapter": scale}), f"scale {scale:g}", data=data)
        lines.append({"scale": scale, **result.to_json_dict()})
    best = min(lines, key=lambda line: line["loss"])
    show.show_scales(lines)
    show.say(
        f"the loss is lowest at scale {best['scale']:g}"
        + ("" if best["scale"] == 1 else "; set it with --set merge.scale=...")
    )
    return {"scales": lines, "best_scale": best["scale"]}
