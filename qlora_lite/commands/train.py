"""The verb `train`: plan, load, score, train, score again, report.

A killed run continues after its last record: each part below reads existing records before it computes.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.report import write_report
from qlora_lite.commands.scoring import Scored, score_after, score_before
from qlora_lite.commands.stopping import resume_command, stop_signals, told_how_to_go_on
from qlora_lite.errors import Interrupted, RunError, UserError
from qlora_lite.files.manifest import read_manifest
from qlora_lite.plan import Plan
from qlora_lite.recipe import Recipe, load_recipe, load_run_recipe
from qlora_lite.runs.folder import RunDir, in_command
from qlora_lite.runs.session import Session
from qlora_lite.training import StepStats, refuse_missing_trackers
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Trained:
    """A finished run, from two of its records."""

    summary: Mapping[str, Any]  # train.json
    scores: Mapping[str, Any]  # eval.json: before, after, groups

    def to_json_dict(self) -> dict[str, Any]:
        return {**self.summary, "eval": self.scores}


def train(
    recipe_name: str,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    resume: bool,
    profile: bool = False,
    base: Path | None = None,
) -> Trained:
    """Plan, load, score, train, score again, and show memory and time. `base` is the new folder of a resumed run's moved base."""
    begin = time.perf_counter()
    recipe = load_recipe(recipe_name, overrides=overrides, files_must_exist=base is None)
    if base is not None and not resume:
        raise UserError(
            "train: --base gives the new folder of a resumed run's base; for a new run, use --set model.base=DIR"
        )
    if resume and run_dir is None:
        raise RunError("--resume needs the run to continue: add --run-dir DIR")
    refuse_missing_trackers(recipe.train.trackers)  # before the long work
    run_dir, made = (run_dir, []) if run_dir is not None else RunDir.claim_next(Path("runs"), recipe.name)
    command = resume_command(recipe_name, overrides, run_dir)
    if resume and RunDir.is_unbegun(run_dir):
        show.say(f"{run_dir}: nothing was trained here yet; the run begins at step 1")
        resume = False
    with (
        told_how_to_go_on(RunDir(run_dir), command),
        Session.open(run_dir, resume=resume, made=made, say=show.say) as session,
    ):
        run, spent = session.run, session.spent
        plan = make_plan(session, recipe, base)
        if resume and lacks_only_its_report(run):
            return report_at_last(run)
        if resume:
            refuse_finished(run)
            for sentence in api.go_on_with(run, plan.recipe):
                show.say(sentence)
        show.show_reasons(list(map(str, plan.reasons)))
        loaded = load(plan, spent)
        before = score_before(plan, loaded, run, spent)
        train_steps(session, plan, loaded, before, profile=profile, command=command)
        scores = before.scores if plan.recipe.data.eval is None else score_after(plan, loaded, run, before, spent)
        memory = run.read_json("memory.json")
        show.show_memory(memory)
        wall_s = time.perf_counter() - begin
        summary = train_summary(run, memory, wall_s=wall_s, spent=spent)
        show.show_time(spent, wall_s=wall_s)
        run.write_json("train.json", summary)
        write_report(run)
    show.say(f"done: {run.path} ({published(run).name}/, report.html). Next: {shlex.join(next_command(run))}")
    return Trained(summary, scores)


def make_plan(session: Session, recipe: Recipe, base: Path | None) -> Plan:
    """Plan a new run, which must fit, or restore the plan of a resumed one. Raises DoesNotFit, RunError, ModelError."""
    run = session.run
    like = load_run_recipe(run.recipe) if session.resumes else None
    if like is not None and base is not None:
        recipe = _with_base_of(like, recipe)
    elif like is not None:
        api.refuse_missing_base(run, like)
    with show.phase("planning", spent=session.spent):
        plan = api.make_plan(recipe, like=like, base=None if like is None else base)
    if like is None:
        plan.refuse_what_does_not_fit()
    else:  # a resumed run has fitted before, or its checkpoint has a leaner footprint
        api.refuse_other_recipe(run, plan.recipe)
    return plan


def _with_base_of(like: Recipe, recipe: Recipe) -> Recipe:
    """Return `recipe` with the run's name of its base; the base's new folder is not part of the recipe."""
    model = {"base": like.model.base, "revision": like.model.revision}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})


def load(plan: Plan, spent: dict[str, float]) -> api.LoadedModel:
    """Load the model for training, with a new adapter."""
    storage = f"{plan.quantization}; quantized once, then read from the cache" if plan.quantization else "16 bits"
    with show.phase(f"loading the base ({storage})", spent=spent) as phase:
        loaded = api.load_model(plan, progress=phase.progress)
        phase.note(f"{format_bytes(sum(loaded.static_bytes.values()))} in memory, SHA-256 {loaded.base_sha256[:12]}")
    return loaded


def train_steps(
    session: Session, plan: Plan, loaded: api.LoadedModel, before: Scored, *, profile: bool, command: str
) -> None:
    """Train to the end and show each step. Raises Interrupted, with the command that continues, after a signal."""
    run, spent = session.run, session.spent
    begin, stepping_s, spent_before = time.perf_counter(), 0.0, sum(spent.values())
    training = session.begin(plan, loaded)
    before.keep(run)
    last: StepStats | None = None
    with stop_signals() as stop:
        steps = training.steps(profile=profile, should_stop=lambda: stop.number is not None)
        first = next(steps, None)
        if first is None:
            return
        with show.TrainScreen(first.num_steps, first_step=first.step - 1) as screen:
            for last in chain([first], steps):
                screen.update(last)
                stepping_s += last.step_s
    elsewhere_s = sum(spent.values()) - spent_before  # checkpoints and the like, already in `spent`
    spent["training"] = stepping_s
    spent["validation, and reading the rows"] = time.perf_counter() - begin - stepping_s - elsewhere_s
    if stop.number is not None and run.trained is None:
        assert last is not None
        raise Interrupted(
            f"stopped after step {last.step} of {last.num_steps}; a checkpoint is written. Continue with:\n  {command}",
            exit_code=128 + stop.number,
        )


def refuse_finished(run: RunDir) -> None:
    """Raise RunError if the run's last record exists; a run stopped while it scored its adapter is not finished."""
    if run.read_json("train.json"):
        raise RunError(
            f"{run.path}: is finished ({len(run.read_steps())} steps), so there is nothing to resume. Merge it with: "
            f"{shlex.join(['qlora-lite', 'merge', in_command(run.path)])}, or train again in another --run-dir"
        )


def lacks_only_its_report(run: RunDir) -> bool:
    """Whether the run was killed just before it wrote report.html."""
    return bool(run.read_json("train.json")) and not (run.path / "report.html").exists()


def report_at_last(run: RunDir) -> Trained:
    """Write report.html of a run that lacks nothing else."""
    path = write_report(run)
    show.say(f"done: {run.path} was finished except for its report: {path}")
    scores = {key: value for key, value in run.read_json("eval.json").items() if key != "schema_version"}
    return Trained(run.read_json("train.json"), scores)


def train_summary(
    run: RunDir, memory: Mapping[str, Any], *, wall_s: float, spent: Mapping[str, float]
) -> dict[str, Any]:
    steps, manifest = run.read_steps(), read_manifest(published(run))
    assert manifest is not None  # published by training
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
    """Return adapter/ or weights/ of a run with finished training."""
    assert run.trained is not None  # published at the end of training
    return run.trained


def next_command(run: RunDir) -> list[str]:
    """Return the next command: `merge`, or `ask` for fully trained weights."""
    if published(run) == run.weights:
        return ["qlora-lite", "ask", in_command(run.path), "..."]
    return ["qlora-lite", "merge", in_command(run.path)]
