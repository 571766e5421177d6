"""The verb `train`: plan, load, score, train, score again, report.

A run that was killed continues after the last record it wrote: each part below reads what is there before it computes.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.report import write_report
from qlora_lite.commands.scoring import score
from qlora_lite.commands.stopping import resume_command, stop_signals, told_how_to_go_on
from qlora_lite.errors import Interrupted, RunError, UserError
from qlora_lite.evaluation import by_phrasing
from qlora_lite.files.manifest import read_manifest
from qlora_lite.plan import Plan
from qlora_lite.recipe import Recipe, load_recipe, load_run_recipe
from qlora_lite.runs.folder import RunDir, in_command
from qlora_lite.training import refuse_missing_trackers
from qlora_lite.units import format_bytes


def train(
    recipe_name: str,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    resume: bool,
    profile: bool = False,
    base: Path | None = None,
) -> dict[str, Any]:
    """Plan, load, score, train, score again, and show what it took. `base` is where the base of a run that is resumed lies now."""
    begin = time.perf_counter()
    recipe = load_recipe(recipe_name, overrides=overrides, files_must_exist=base is None)
    if base is not None and not resume:
        raise UserError(
            "train: --base names the moved base of a run that is resumed; of a new run set it: --set model.base=DIR"
        )
    if resume and run_dir is None:
        raise RunError("--resume needs the run to continue: add --run-dir DIR")
    # A missing package and an unusable folder are said before the long work, not after it.
    refuse_missing_trackers(recipe.train.trackers)
    run_dir, made = (run_dir, []) if run_dir is not None else RunDir.claim_next(Path("runs"), recipe.name)
    command = resume_command(recipe_name, overrides, run_dir)
    if resume and RunDir.is_unbegun(run_dir):
        show.say(f"{run_dir}: nothing was trained here yet, so this run begins at step 1")
        resume = False
    with (
        told_how_to_go_on(RunDir(run_dir), command),
        RunDir.writing(run_dir) if resume else RunDir.creating(run_dir, made=made) as run,
    ):
        spent: dict[str, float] = {}
        like = load_run_recipe(run.recipe) if resume else None
        if like is not None and base is not None:
            recipe = _with_base_of(like, recipe)
        elif like is not None:
            api.refuse_missing_base(run, like)
        with show.phase("planning", spent=spent):
            plan = api.make_plan(recipe, like=like, base=base if resume else None)
        if not resume:  # what ran once has shown that it fits, or has a leaner footprint in its checkpoint
            plan.refuse_what_does_not_fit()
        else:
            api.refuse_other_recipe(run, plan.recipe)
            if lacks_only_its_report(run):
                return report_at_last(run)
            refuse_finished(run)
            for sentence in api.go_on_with(run, plan.recipe):
                show.say(sentence)
        show.show_reasons(plan.reasons)
        loaded = load(plan, spent)
        scores, answers = scores_before(plan, loaded, run, spent)
        train_steps(plan, loaded, run, scores, answers, resume=resume, profile=profile, command=command, spent=spent)
        if plan.recipe.data.eval is not None:
            scores = scores_after(plan, loaded, run, scores, spent)
        memory = run.read_json("memory.json")
        show.show_memory(memory)
        summary = train_summary(run, memory, wall_s=time.perf_counter() - begin, spent=spent)
        show.show_time(spent, wall_s=summary["wall_s"])
        run.write_json("train.json", summary)
        write_report(run)
    show.say(f"done: {run.path} ({published(run).name}/, report.html). Next: {shlex.join(next_command(run))}")
    return summary | {"eval": scores}


def _with_base_of(like: Recipe, recipe: Recipe) -> Recipe:
    """The run's word for its base: where that lies now is no part of the recipe."""
    model = {"base": like.model.base, "revision": like.model.revision}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


def load(plan: Plan, spent: dict[str, float]) -> api.LoadedModel:
    """The model ready to train, with a new adapter."""
    how = f"{plan.quantization}; quantized once, then read from the cache" if plan.quantization else "16 bits"
    with show.phase(f"loading the base ({how})", spent=spent) as phase:
        loaded = api.load_model(plan, progress=phase.progress)
        phase.note(f"{format_bytes(sum(loaded.static_bytes.values()))} in memory, SHA-256 {loaded.base_sha256[:12]}")
    return loaded


def refuse_finished(run: RunDir) -> None:
    """A run with its last file written; one that was stopped while its adapter was scored still has that to do."""
    if run.read_json("train.json"):
        raise RunError(
            f"{run.path}: is finished ({len(run.read_steps())} steps), so there is nothing to resume. Merge it with: "
            f"{shlex.join(['qlora-lite', 'merge', in_command(run.path)])}, or train again in another --run-dir"
        )


def lacks_only_its_report(run: RunDir) -> bool:
    """It was killed when all but its page was written."""
    return bool(run.read_json("train.json")) and not (run.path / "report.html").exists()


def report_at_last(run: RunDir) -> dict[str, Any]:
    """For a run that was killed when all but its page was written."""
    path = write_report(run)
    show.say(f"done: {run.path} was finished but for its page: {path}")
    scores = {key: value for key, value in run.read_json("eval.json").items() if key != "schema_version"}
    return run.read_json("train.json") | {"eval": scores}


def scores_before(
    plan: Plan, loaded: api.LoadedModel, run: RunDir, spent: dict[str, float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What eval.json and predictions.jsonl hold before training: how well it starts; from there when the run is resumed."""
    scores = {key: value for key, value in run.read_json("eval.json").items() if key != "schema_version"}
    if scores or plan.recipe.data.eval is None:
        scores = {"before": None, "after": None, "groups": {}} | scores
        if not all(isinstance(scores[key], dict | None) for key in ("before", "after", "groups")):
            raise RunError(
                f"{run.path / 'eval.json'}: damaged (not scores). Remove it and run the step that writes it again"
            )
        return scores, run.read_predictions()
    start = "base model" if plan.recipe.lora.init_from is None else "adapter that training starts from"
    result = score(plan, loaded, f"scoring the {start}", spent=spent)
    groups = {name: {"before": group, "after": {}} for name, group in by_phrasing(result.predictions).items()}
    answers = [
        {"id": each.id, "question": each.question, "gold": each.gold, "base_prediction": each.prediction}
        for each in result.predictions
    ]
    return {"before": result.to_json_dict(), "after": None, "groups": groups}, answers


def scores_after(
    plan: Plan, loaded: api.LoadedModel, run: RunDir, scores: dict[str, Any], spent: dict[str, float]
) -> dict[str, Any]:
    """Score the tuned model, show and keep scores and answers beside those of before."""
    result = score(plan, loaded, "scoring the tuned model", spent=spent)
    groups = {
        name: {"before": scores["groups"].get(name, {}).get("before", {}), "after": group}
        for name, group in by_phrasing(result.predictions).items()
    }
    scores = scores | {"after": result.to_json_dict(), "groups": groups}
    run.write_json("eval.json", scores)
    before = _answers_in_turn(run.read_predictions())
    run.write_predictions(
        asdict(each) | {"base_prediction": next(before.get((each.id, each.question), iter(())), None)}
        for each in result.predictions
    )
    shown = {f"{name} phrasing": group for name, group in groups.items()}
    show.show_scores(scores["before"], scores["after"], groups=shown)
    return scores


def _answers_in_turn(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Any], Iterator[Any]]:
    """(id, question) -> the answers of the base, in the order of the rows: several rows may have one id, and one row several examples."""
    found: dict[tuple[str, Any], list[Any]] = {}
    for line in lines:
        found.setdefault((line["id"], line.get("question")), []).append(line.get("base_prediction"))
    return {key: iter(answers) for key, answers in found.items()}


def train_steps(
    plan: Plan,
    loaded: api.LoadedModel,
    run: RunDir,
    scores: dict[str, Any],
    answers: list[dict[str, Any]],
    *,
    resume: bool,
    profile: bool,
    command: str,
    spent: dict[str, float],
) -> None:
    begin, stepping_s, spent_before = time.perf_counter(), 0.0, sum(spent.values())
    with stop_signals() as stop:
        steps = api.train(
            plan,
            loaded,
            run.path,
            resume=resume,
            profile=profile,
            should_stop=lambda: stop.number is not None,
            say=show.say,
            spent=spent,
        )
        first = next(steps, None)
        if scores["before"] is not None:  # not sooner: api.train wants its folder empty
            run.write_predictions(answers)  # first: where eval.json is, a resumed run does not answer again
            run.write_json("eval.json", scores)
        if first is None:
            return
        with show.TrainScreen(first.num_steps, first_step=first.step - 1) as screen:
            for last in chain([first], steps):
                screen.update(last)
                stepping_s += last.step_s
    elsewhere_s = sum(spent.values()) - spent_before  # checkpoints and the like, in `spent` already
    spent["training"] = stepping_s
    spent["validation, and reading the rows"] = time.perf_counter() - begin - stepping_s - elsewhere_s
    if stop.number is not None and run.trained is None:
        raise Interrupted(
            f"stopped after step {last.step} of {last.num_steps}; a checkpoint is written. Continue with:\n  {command}",
            exit_code=128 + stop.number,
        )


def train_summary(
    run: RunDir, memory: Mapping[str, Any], *, wall_s: float, spent: Mapping[str, float]
) -> dict[str, Any]:
    steps, manifest = run.read_steps(), read_manifest(published(run))
    assert manifest is not None  # training has just published it
    eval_losses = [step["eval_loss"] for step in steps if step.get("eval_loss") is not None]
    train_s = sum(step["step_s"] for step in steps)
    return {
        "run_dir": str(run.path),
        "num_steps": len(steps),
        "stopped_early": steps[-1]["step"] < steps[-1]["num_steps"],
        "adapter_step": manifest["step"],
        "eval_loss": {"best": min(eval_losses), "last": eval_losses[-1]} if eval_losses else None,
        "num_tokens": sum(step["num_tokens"] for step in steps),
        "train_s": train_s,
        "wall_s": wall_s,
        "phases_s": dict(spent),
        "examples_per_s": sum(step["num_examples"] for step in steps) / train_s,
        "label_tokens_per_s": sum(step["num_label_tokens"] for step in steps) / train_s,
        "peak_bytes": memory["peak_bytes"],
        "rss_bytes": memory["rss_bytes"],
    }


def published(run: RunDir) -> Path:
    """adapter/ or weights/ of a run whose training has come to its end."""
    assert run.trained is not None  # training has come to its end
    return run.trained


def next_command(run: RunDir) -> list[str]:
    """`merge`; weights that were trained themselves are asked at once."""
    if published(run) == run.weights:
        return ["qlora-lite", "ask", in_command(run.path), "..."]
    return ["qlora-lite", "merge", in_command(run.path)]
