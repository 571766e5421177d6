"""The verb `merge`: add the adapter to a dequantized 16-bit checkpoint, prove the result, and score it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.report import write_report
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.evaluation import EvalResult
from qlora_lite.merging import MergeResult
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint with its proof and its scores: merge.json of a run."""

    result: MergeResult
    base: str  # merge.base of the recipe
    adapter_scores: Mapping[str, Any] | None  # `after` of eval.json
    merged: EvalResult | None  # None without held-out rows

    def to_json_dict(self) -> dict[str, Any]:
        scores = {"adapter": self.adapter_scores, "merged": self.merged and self.merged.to_json_dict()}
        return self.result.to_json_dict() | {"base": self.base, "eval": scores}


def merge(run_dir: Path, out: Path | None, overrides: Sequence[str] = (), *, base: Path | None = None) -> Merged:
    """Merge the adapter into a dequantized checkpoint, prove it, and score it beside the adapter model."""
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    with run.locked():
        return _merge(run, plan, out)


def _merge(run: RunDir, plan: Plan, out: Path | None) -> Merged:
    out = out or run.merged
    if run.read_json("merge.json").get("out") == str(out) and out.is_dir() and any(out.iterdir()):
        write_report(run)  # a merge killed at its very end may lack it
        raise UserError(f"{out}: already exists and is not an empty folder; name another folder, or remove it first")
    with show.phase("merging and proving"):
        result = api.merge(plan, run.path, out)
    for warning in result.warnings:
        show.say_warning(warning)
    adapter_scores, scored = run.read_json("eval.json").get("after"), None
    if plan.recipe.data.eval is not None and Path(plan.recipe.data.eval).exists():
        with show.phase("loading the merged model"):
            loaded = api.load_plain(plan, result.out)
        scored = score(plan, loaded, "scoring the merged model")
    merged = Merged(result, plan.recipe.merge.base, adapter_scores, scored)
    run.write_json("merge.json", merged.to_json_dict())
    show.show_proof(merged.to_json_dict())
    if scored is not None:
        show.show_scores(adapter_scores, scored.to_json_dict(), title="adapter (before) and merged (after)")
    write_report(run)
    show.say(f"merged: {result.out} ({format_bytes(result.total_bytes)}, {result.dtype}, {result.rounding} rounding)")
    return merged
