"""The verb `merge`: add the adapter to a dequantized 16-bit checkpoint, prove the result, and score it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.report import write_report
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir
from qlora_lite.units import format_bytes


def merge(
    run_dir: Path, out: Path | None, overrides: Sequence[str] = (), *, base: Path | None = None
) -> dict[str, Any]:
    """Merge the adapter into a dequantized checkpoint, prove it, and score it beside the adapter model."""
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    with run.locked():
        return _merge(run, plan, out)


def _merge(run: RunDir, plan: Plan, out: Path | None) -> dict[str, Any]:
    out = out or run.merged
    if run.read_json("merge.json").get("out") == str(out) and out.is_dir() and any(out.iterdir()):
        write_report(run)  # a merge killed at its very end may lack it
        raise UserError(f"{out}: already exists and is not an empty folder; name another folder, or remove it first")
    with show.phase("merging and proving"):
        result = api.merge(plan, run.path, out)
    for warning in result.warnings:
        show.say_warning(warning)
    facts = result.to_json_dict() | {"base": plan.recipe.merge.base}
    facts["eval"] = {"adapter": run.read_json("eval.json").get("after"), "merged": None}
    if plan.recipe.data.eval is not None and Path(plan.recipe.data.eval).exists():
        with show.phase("loading the merged model"):
            loaded = api.load_plain(plan, result.out)
        facts["eval"]["merged"] = score(plan, loaded, "scoring the merged model").to_json_dict()
    run.write_json("merge.json", facts)
    show.show_proof(facts)
    if facts["eval"]["merged"] is not None:
        show.show_scores(facts["eval"]["adapter"], facts["eval"]["merged"], title="adapter (before) and merged (after)")
    write_report(run)
    show.say(f"merged: {result.out} ({format_bytes(result.total_bytes)}, {result.dtype}, {result.rounding} rounding)")
    return facts
