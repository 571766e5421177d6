"""The verb `mix`: the weighted sum of several adapters, written as one."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.compared import judge_of
from qlora_lite.runs.adapters import MixedAdapter, open_source, parse_part
from qlora_lite.runs.adapters import mix as mix_adapters
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Mixed:
    """The written sum, and the share of its effect that a rank or a type loses."""

    adapter: MixedAdapter
    is_scored: bool  # False for an exact sum and with --no-score
    proof: api.EffectLost | None  # None also if no part has held-out rows

    def to_json_dict(self) -> dict[str, Any]:
        proof = {"proof": self.proof and asdict(self.proof)} if self.is_scored else {}
        return self.adapter.to_json_dict() | proof


def mix(
    parts: Sequence[str],
    out: Path,
    *,
    rank: int | None,
    dtype: str = "fp32",
    score: bool = True,
    base: Path | None = None,
) -> Mixed:
    """Write the weighted sum of several adapters as one; report the share of the effect that a rank or `dtype` loses."""
    asked = [parse_part(part) for part in parts]
    is_exact = rank is None and dtype == "fp32"
    sources = [] if is_exact or not score else [open_source(part.path) for part in asked]
    judge = judge_of(next((source for source in sources if source.run is not None), None), base)
    with show.phase("adding the changes"):
        mixed = mix_adapters(asked, out, rank=rank, dtype=dtype)
    exact = "exact" if dtype == "fp32" else f"exact except for storage as {dtype}"
    lost = f", {mixed.lost_share:.2%} of the sum lost" if rank is not None else f", {exact}"
    show.say(
        f"written: {out} (rank {mixed.r}{lost}, {format_bytes(mixed.adapter_bytes)}). Next: qlora-lite eval {out}, or merge it"
    )
    proof = None
    if judge is not None:
        with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
            whole = Path(folder) / "mix"
            mix_adapters(asked, whole)
            proof = judge.effect_lost(whole, out)
    return Mixed(mixed, is_scored=bool(sources), proof=proof)
