"""The parts of the verb `train`, in the order in which pipeline.py calls them, and the run's page.

In: a plan, the loaded model, a run directory, where each part keeps its records: a killed run goes on behind the last one.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.stopping import stop_signals
from qlora_lite.errors import Interrupted, RunError
from qlora_lite.evaluation import EvalResult, by_phrasing
from qlora_lite.files.manifest import read_manifest
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir, in_command
from qlora_lite.units import format_bytes


def load(plan: Plan, spent: dict[str, float]) -> api.LoadedModel:
    """The model ready to train, with a new adapter."""
    how = f"{plan.quantization}; quantized once, then read from the cache" if plan.quantization else "16 bits"
    with show.phase(f"loading the base ({how})", spent=spent) as phase:
        loaded = api.load_model(plan, progress=phase.progress)
        phase.note(f"{format_bytes(sum(loaded.static_bytes.values()))} in memory, SHA-256 {loaded.base_sha256[:12]}")
    return loaded


def score(
    plan: Plan,
    loaded: api.LoadedModel,
    title: str,
    *,
    data: Path | None = None,
    spent: dict[str, float] | None = None,
) -> EvalResult:
    """Exact match, F1 and loss on the plan's held-out rows, or those of `data`."""
    with show.phase(title, spent=spent) as phase:
        result = api.evaluate(plan, loaded, data=data, progress=phase.progress)
        phase.note(_scores_in_words(result))
    for sentence in result.account:
        show.say_warning(sentence)
    return result


def _scores_in_words(result: EvalResult) -> str:
    if result.exact_match is None or result.f1 is None:
        return (
            f"loss {result.loss:.3f}, {result.num_examples} texts; exact match and F1 need answers, plain text has none"
        )
    return f"exact match {result.exact_match:.1f}, F1 {result.f1:.1f}, {result.num_examples} questions"


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


def write_report(run: RunDir) -> Path:
    """The run's page anew from its files."""
    path = run.path / "report.html"
    run.write_text(path.name, show.render_report(run.path))
    return path
