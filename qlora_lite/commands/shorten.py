"""`rank --to` and `rank --parameters`: write a shorter adapter, and show its cost on held-out rows."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.compared import Judge
from qlora_lite.commands.scoring import score
from qlora_lite.evaluation import EvalResult
from qlora_lite.runs.adapters import ShorterAdapter, Source, truncate
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Judged:
    """The cost of a shorter adapter on held-out rows."""

    proof: api.EffectLost
    before: EvalResult
    after: EvalResult

    def to_json_dict(self) -> dict[str, Any]:
        scores = {"before": self.before.to_json_dict(), "after": self.after.to_json_dict()}
        return {"proof": asdict(self.proof), "eval": scores}


@dataclass(frozen=True)
class Shortened:
    """A shorter adapter and its cost."""

    adapter: ShorterAdapter
    judged: Judged | None  # None without a judge

    def to_json_dict(self) -> dict[str, Any]:
        return self.adapter.to_json_dict() | ({} if self.judged is None else self.judged.to_json_dict())


def shorten(
    source: Source, out: Path, *, rank: int | None, num_parameters: int | None, dtype: str, judge: Judge | None
) -> Shortened:
    """Write the best approximation of this rank or number of parameters; `judge` compares it with the whole adapter."""
    shorter = truncate(source, out, rank=rank, num_parameters=num_parameters, dtype=dtype)
    size, num = shorter.adapter_bytes, shorter.num_parameters
    show.say(
        f"written: {out}: {num.after:,} of {num.before:,} parameters, {format_bytes(size.after)} of "
        f"{format_bytes(size.before)}; {shorter.lost_share:.2%} of the change lost"
    )
    return Shortened(shorter, None if judge is None else _judge(judge, source.folder, out))


def _judge(judge: Judge, whole: Path, shorter: Path) -> Judged:
    proof = judge.effect_lost(whole, shorter)
    before, after = (
        score(judge.plan, api.load_model(judge.plan, adapter=folder), title)
        for folder, title in ((whole, "scoring the adapter"), (shorter, "scoring the shorter one"))
    )
    title = "adapter (before) and shorter one (after)"
    show.show_scores(before.to_json_dict(), after.to_json_dict(), title=title)
    return Judged(proof, before, after)
