"""`rank --to` and `rank --parameters`: write a shorter adapter, and show its cost on held-out rows."""

from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.compared import Judge
from qlora_lite.commands.scoring import score
from qlora_lite.runs.adapters import Source, truncate
from qlora_lite.units import format_bytes


def shorten(
    source: Source, out: Path, *, rank: int | None, num_parameters: int | None, dtype: str, judge: Judge | None
) -> dict[str, Any]:
    """Write the best approximation of this rank or number of parameters; `judge` compares it with the whole adapter."""
    shorter = truncate(source, out, rank=rank, num_parameters=num_parameters, dtype=dtype)
    size, num = shorter["adapter_bytes"], shorter["num_parameters"]
    show.say(
        f"written: {out}: {num['after']:,} of {num['before']:,} parameters, {format_bytes(size['after'])} of "
        f"{format_bytes(size['before'])}; {shorter['lost_share']:.2%} of the change lost"
    )
    if judge is not None:
        shorter["proof"] = judge.effect_lost(source.folder, out)
        before, after = (
            score(judge.plan, api.load_model(judge.plan, adapter=folder), title).to_json_dict()
            for folder, title in ((source.folder, "scoring the adapter"), (out, "scoring the shorter one"))
        )
        shorter["eval"] = {"before": before, "after": after}
        show.show_scores(before, after, title="adapter (before) and shorter one (after)")
    return shorter
