"""The verbs about the change itself: how much of it there is (rank), adding changes up (mix), and how much of one is best (scales).

Like pipeline.py: each function puts in order what adapters.py and api.py compute, shows it, and returns what `--json` prints.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.pipeline import answer, merge
from qlora_lite.commands.running import score as score_model
from qlora_lite.commands.running import write_report
from qlora_lite.errors import RunError, UserError
from qlora_lite.merging.advice import advice_of_curve
from qlora_lite.merging.mix import mix_adapters
from qlora_lite.plan import Plan
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.adapters import Asked, Blend, Source, mix, open_source, parse_part, parts_of, rank_report, truncate
from qlora_lite.runs.folder import RunDir
from qlora_lite.units import format_bytes

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def rank(
    run_dir: Path,
    *,
    other: Path | None = None,
    to: int | None = None,
    num_parameters: int | None = None,
    out: Path | None = None,
    dtype: str = "fp32",
    score: bool = True,
    base: Path | None = None,
) -> dict[str, Any]:
    """The spectrum of a run's change, and the advice; with `to` or `num_parameters` a shorter adapter at `out`, and what it costs.

    `dtype` is what the shorter adapter's factors are stored in.
    """
    source = open_source(run_dir)
    with show.phase("singular values of every change"):
        report = rank_report(source, None if other is None else open_source(other))
    show.show_spectra(report)
    if to is not None or num_parameters is not None:
        if out is None:
            raise UserError("rank: --to and --parameters write a shorter adapter; say where with --out DIR")
        report["truncated"] = _truncate(source, out, to, num_parameters, dtype=dtype, score=score, base=base)
    elif source.run is not None:
        with source.run.locked():
            source.run.write_json("rank.json", report)
            write_report(source.run)
    show.say(report["advice"])
    return report


def try_ranks(recipe_name: str, overrides: Sequence[str], *, ranks: Sequence[int], share: float) -> dict[str, Any]:
    """Train each rank for a share of the recipe's epochs and score it: a curve of what more rank brings, and the advice."""
    if not ranks or min(ranks) < 1 or not 0 < share <= 1:
        raise UserError(
            "rank: --try takes whole numbers above 0, such as 1,2,4,8,16, and --share a number above 0, at most 1"
        )
    recipe = load_recipe(recipe_name, overrides=overrides)
    if recipe.method == "full" or recipe.data.eval is None:
        raise UserError(
            f"{recipe_name}: trying ranks needs an adapter (method qlora or lora) and held-out rows (data.eval)"
        )
    ratio, epochs = recipe.lora.lora_alpha / recipe.lora.r, (recipe.train.epochs or 1.0) * share
    plans: dict[int, Plan] = {}
    for r in sorted(set(ranks)):  # all of them before the first is trained
        own = [f"lora.r={r}", f"lora.lora_alpha={max(1, round(ratio * r))}", f"train.epochs={epochs:g}"]
        own += [f"train.max_steps={max(1, round(recipe.train.max_steps * share))}"] if recipe.train.max_steps else []
        plans[r] = api.make_plan(load_recipe(recipe_name, overrides=[*overrides, *own]))
        plans[r].refuse_what_does_not_fit()
    curve = [_try_rank(plan, r) for r, plan in plans.items()]
    found = {"curve": curve, "share": share, "advice": advice_of_curve(curve)}
    show.show_rank_curve(curve)
    show.say(found["advice"])
    return found


def mix_runs(
    parts: Sequence[str],
    out: Path,
    *,
    rank: int | None,
    dtype: str = "fp32",
    score: bool = True,
    base: Path | None = None,
) -> dict[str, Any]:
    """Write the weighted sum of several adapters as one; where a rank or `dtype` loses something, say how much of the effect."""
    asked = [parse_part(part) for part in parts]
    compares = score and (rank is not None or dtype != "fp32")
    if compares:
        sources = [open_source(each.path) for each in asked]
        _plan_of_scoring(next((source for source in sources if source.run is not None), None), base)
    with show.phase("adding the changes up"):
        found = mix(asked, out, rank=rank, dtype=dtype)
    exact = "exact" if dtype == "fp32" else f"exact but for storing it as {dtype}"
    lost = f", {found['lost_share']:.2%} of the sum lost" if rank is not None else f", {exact}"
    show.say(
        f"written: {out} (rank {found['r']}{lost}, {format_bytes(found['adapter_bytes'])}). Next: qlora-lite eval {out}, or merge it"
    )
    if compares:
        with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
            whole = Path(folder) / "mix"
            mix(asked, whole)
            found["proof"] = _effect_lost(out, whole, base=base)
    return found


def merge_mix(
    run_dir: Path, out: Path | None, parts: Sequence[str], overrides: Sequence[str], *, base: Path | None = None
) -> dict[str, Any]:
    """Merge the weighted sum of several adapters into the base of the run, with proof."""
    if out is None:
        raise UserError(
            "merge: --mix needs to know where to write: qlora-lite merge RUN_DIR OUT --mix RUN_DIR:WEIGHT ..."
        )
    with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
        mixed = Path(folder) / "mix"
        mix([parse_part(part) for part in parts], mixed)
        if not RunDir(mixed).has_begun:
            raise RunError(f"{run_dir}: at least one adapter of a mix must be a run, which says what base it is for")
        return merge(mixed, out, overrides, base=base)


def ask_mix(
    run_dir: Path, question: str, parts: Sequence[str], *, passage: str | None, base: Path | None = None
) -> dict[str, Any]:
    """Answer with the weighted sum of several adapters, without writing anything."""
    run, plan = api.open_run(run_dir, base=base)
    api.run_base(plan, run)
    asked, _ = parts_of([parse_part(part) for part in parts])
    with show.phase("loading the base and the adapters"):
        loaded = Blend(plan, {"mix": mix_adapters(asked).adapter}).use({"mix": 1.0})
    return {"answers": {"mix": answer(plan, loaded, "mix", question, passage)}}


def ask_many(
    run_dir: Path, lines: Iterable[str], parts: Sequence[str], *, passage: str | None, base: Path | None = None
) -> dict[str, Any]:
    """Answer each line with one loaded base. A line `/use NAME:WEIGHT ...` weighs the adapters from there on, by their folders' names.

    Without `parts` the run's own adapter is the only one; at first each counts as `parts` says. A `/use` that cannot be understood is
    said and changes nothing. Raises UserError, ModelError, RunError.
    """
    run, plan = api.open_run(run_dir, base=base)
    api.run_base(plan, run)
    asked = [parse_part(part) for part in parts] or [Asked(run_dir, 1.0, {})]
    if any(each.weights for each in asked):
        raise UserError(
            "ask: weights of single modules go with one question; for several, write the sum first: qlora-lite mix"
        )
    found, _ = parts_of(asked)
    names = _short_names([each.path for each in asked])
    with show.phase("loading the base and the adapters"):
        blend = Blend(plan, {name: part.adapter for name, part in zip(names, found, strict=True)})
    weights = {name: each.weight for name, each in zip(names, asked, strict=True)}
    show.say(
        f"a line is a question; /use {' '.join(f'{name}:1' for name in names)} weighs the adapters (those not named count 0)"
    )
    answers: list[dict[str, Any]] = []
    for line in map(str.strip, lines):
        if line.startswith("/use"):
            try:
                weights = _weights_of(line, names)
            except UserError as error:
                show.say_warning(str(error))
        elif line:
            loaded = blend.use(weights)
            title = " ".join(f"{name}:{weight:g}" for name, weight in weights.items())
            answers.append({"question": line, "weights": weights, "answer": answer(plan, loaded, title, line, passage)})
    return {"answers": answers}


def _weights_of(line: str, names: Sequence[str]) -> dict[str, float]:
    given = [parse_part(word) for word in line.split()[1:]]
    unknown = [str(each.path) for each in given if str(each.path) not in names or each.weights]
    if unknown or not given:
        raise UserError(f"{line!r}: expected /use NAME:WEIGHT ..., with names of {', '.join(names)}")
    return {str(each.path): each.weight for each in given}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' last names, or their whole paths where two are called the same."""
    last = [path.resolve().name for path in paths]
    return last if len(set(last)) == len(last) else [str(path) for path in paths]


def sweep_scale(
    run_dir: Path,
    scales: Sequence[float],
    *,
    data: Path | None,
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> dict[str, Any]:
    """Loss, exact match and F1 with the change at each scale: 0 is the base, 1 as it was trained."""
    if not scales or not all(map(math.isfinite, scales)):
        raise UserError("--scales: expected numbers, such as 0,0.5,1,1.5")
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    api.run_base(plan, run)
    with show.phase("loading the base and the adapter"):
        blend = Blend(plan, {"adapter": open_source(run_dir).read()})
    lines: list[dict[str, Any]] = []
    for scale in scales:
        result = score_model(plan, blend.use({"adapter": scale}), f"scale {scale:g}", data=data)
        lines.append({"scale": scale, **result.to_json_dict()})
    best = min(lines, key=lambda line: line["loss"])
    show.show_scales(lines)
    show.say(
        f"the loss is lowest at scale {best['scale']:g}"
        + ("" if best["scale"] == 1 else "; set it with --set merge.scale=...")
    )
    return {"scales": lines, "best_scale": best["scale"]}


def _truncate(
    source: Source,
    out: Path,
    to: int | None,
    num_parameters: int | None,
    *,
    dtype: str,
    score: bool,
    base: Path | None,
) -> dict[str, Any]:
    plan = _plan_of_scoring(source, base) if score else None
    found = truncate(source, out, rank=to, num_parameters=num_parameters, dtype=dtype)
    size = found["adapter_bytes"]
    show.say(
        f"written: {out}: {found['num_parameters']['after']:,} of {found['num_parameters']['before']:,} parameters, "
        f"{format_bytes(size['after'])} of {format_bytes(size['before'])}; {found['lost_share']:.2%} of the change lost"
    )
    if plan is not None:
        found["proof"] = _effect_lost(out, source.folder, base=base)
        before, after = (
            score_model(plan, api.load_model(plan, adapter=folder), name).to_json_dict()
            for folder, name in ((source.folder, "scoring the adapter"), (out, "scoring the shorter one"))
        )
        found["eval"] = {"before": before, "after": after}
        show.show_scores(before, after, title="adapter (before) and shorter one (after)")
    return found


def _plan_of_scoring(source: Source | None, base: Path | None) -> Plan | None:
    """The plan of the run whose held-out rows two adapters are compared on; None where there are no such rows.

    Called before anything is written: raises RunError where the run's base is not there or is another one.
    """
    if source is None or source.run is None:
        return None
    run, plan = api.open_run(source.run.path, base=base)
    if plan.recipe.data.eval is None:
        return None
    if not Path(plan.recipe.data.eval).exists():
        show.say(f"{plan.recipe.data.eval}: the run's held-out rows are not there, so nothing is scored")
        return None
    api.run_base(plan, run)
    return plan


def _effect_lost(out: Path, exact: Path, *, base: Path | None = None) -> dict[str, Any] | None:
    """What the adapter at `out` loses of the effect of the one at `exact`; None where no run says what to compare them on."""
    if not RunDir(out).has_begun:
        return None
    run, plan = api.open_run(out, base=base)
    if not _has_held_out_rows(plan):
        return None
    with show.phase("comparing the two on held-out rows") as phase:
        lost = api.effect_lost(plan, run, exact, out)
        phase.note(f"{lost.lost_share:.2%} of the adapter's effect lost, {lost.num_label_tokens} label tokens")
    return asdict(lost)


def _has_held_out_rows(plan: Plan) -> bool:
    return plan.recipe.data.eval is not None and Path(plan.recipe.data.eval).exists()


def _try_rank(plan: Plan, r: int) -> dict[str, Any]:
    """A line of the curve: trained in a folder that goes away again."""
    with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
        run = RunDir(Path(folder) / "run")
        with show.phase(f"r={r}: training"):
            loaded = api.load_model(plan)
            steps = list(api.train(plan, loaded, run.path))
        adapter_bytes = sum(path.stat().st_size for path in run.adapter.glob("*.safetensors"))
    result = score_model(plan, loaded, f"r={r}: scoring")
    return {
        "r": r,
        "planned_peak_bytes": plan.peak_bytes,
        "adapter_bytes": adapter_bytes,
        "num_steps": len(steps),
        "train_s": sum(step.step_s for step in steps),
        **result.to_json_dict(),
    }
