"""A training run: the steps of the loop, and everything that they leave in the run's folder. All of it goes through `RunDir`."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qlora_lite.data.batches import StepSampler, largest_step, sampler_of
from qlora_lite.data.examples import Examples
from qlora_lite.data.repeats import find_repeats
from qlora_lite.errors import DoesNotFit, RunError, TrainingStopped, UserError
from qlora_lite.evaluation import validation_loss
from qlora_lite.evaluation.held_out import account_of
from qlora_lite.runs.loading import LoadedModel, held_out_examples, template_of, training_examples
from qlora_lite.memory.kept import disk_speed
from qlora_lite.base.identity import files_of_base
from qlora_lite.base.shipped import default_cache
from qlora_lite.model.factors import factors_file
from qlora_lite.base.generation_settings import add_stop_tokens
from qlora_lite.files.manifest import sha256_of_file, write_manifest
from qlora_lite.files.staging import remove_folder, staged_folder
from qlora_lite.model.trained import folder_name
from qlora_lite.plan import Plan, as_json
from qlora_lite.recipe import Recipe, dump_recipe
from qlora_lite.runs.resume import (
    computed_otherwise,
    computed_with,
    data_hashes,
    fixed_sha256,
    go_on_with,
    refuse_other_base,
    refuse_other_data,
    versions,
)
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.memory_record import compared, memory_of_run
from qlora_lite.training import (
    Preflight,
    StepStats,
    Trace,
    TrainSettings,
    TrainState,
    allocator_statistics,
    best_valid,
    make_optimizer,
    newest_valid,
    open_trackers,
    refuse_missing_trackers,
    save_checkpoint,
    state_bytes,
    train_steps,
    try_largest_batch,
)
from qlora_lite.training.seeds import purpose_seed


def train(
    plan: Plan,
    loaded: LoadedModel,
    run_dir: Path | str,
    *,
    resume: bool = False,
    profile: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    spent: dict[str, float] | None = None,
) -> Iterator[StepStats]:
    """Train and keep `run_dir`: one `StepStats` per optimizer step, checkpoints on the way, adapter/ (or weights/) at the end.

    `resume` continues from the newest whole checkpoint. When `should_stop()` becomes true, the step that is under way is
    finished, a checkpoint written, and the generator ends. A finished run has no steps left. Afterwards `loaded` holds the
    factors that adapter/ holds: those of the lowest validation loss where the recipe asks for evaluations, else the last.
    Before the first step the largest micro-batch is tried; one that runs out of memory, then or later, is repeated with leaner
    settings, said through `say`. With `profile`, profile/ gets a timeline of two steps. `spent` gets the seconds of what is not a step.
    Raises RunError, DataError, TrainingStopped, DoesNotFit, or UserError for a tracker that is not installed.
    """
    refuse_missing_trackers(plan.recipe.train.trackers)
    run = RunDir.open(run_dir) if resume else RunDir.create(run_dir)
    with run.locked():
        spent = {} if spent is None else spent
        yield from _train(
            plan, loaded, run, resume=resume, profile=profile, should_stop=should_stop, say=say, spent=spent
        )


def _train(
    plan: Plan,
    loaded: LoadedModel,
    run: RunDir,
    *,
    resume: bool,
    profile: bool,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    spent: dict[str, float],
) -> Iterator[StepStats]:
    recipe = plan.recipe
    data = data_hashes(recipe)
    if resume:
        for sentence in go_on_with(run, recipe):
            say(sentence)
        refuse_other_base(run, loaded.base_sha256, loaded.base)
        refuse_other_data(run, data)
    examples = training_examples(plan, loaded.tokenizer)
    for sentence in examples.account("training rows", limit="data.num_train"):
        say(sentence)
    has_held_out = recipe.data.eval is not None and Path(recipe.data.eval).exists()
    held_out = held_out_examples(plan, loaded.tokenizer) if has_held_out else None
    for sentence in account_of(held_out) if held_out and recipe.train.eval_every_steps is not None else ():
        say(sentence)
    for sentence in find_repeats(examples, held_out).sentences:
        say(f"warning: {sentence}")
    sampler = sampler_of(
        examples,
        examples_per_step=recipe.train.examples_per_step,
        epochs=recipe.train.epochs or 1.0,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
        share=plan.shares,
    )
    optimizer = make_optimizer(
        loaded.model.named_parameters(),
        name=recipe.train.optimizer,
        learning_rate=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay,
        loraplus_ratio=recipe.train.loraplus_ratio,
    )
    scaler = torch.amp.GradScaler(plan.device, enabled=plan.types.scale_loss)
    state = TrainState(loaded.model, optimizer, scaler)
    torch.manual_seed(purpose_seed(recipe.train.seed, "dropout"))
    if resume:
        _resume(state, run, plan, say)
    else:
        _write_start(run, plan, loaded, data)
    state.footprint = state.footprint or plan.chosen.footprint
    with _clocked(spent, "trying the largest micro-batch"):
        tried = _preflight(plan, state, examples, sampler, say)
    trace = Trace(run.profile, device=plan.device) if profile else None
    steps = train_steps(
        state,
        examples,
        sampler,
        TrainSettings(
            plan.device,
            recipe.train.learning_rate,
            recipe.train.schedule,
            recipe.train.warmup_ratio,
            recipe.train.max_grad_norm,
            eval_every_steps=recipe.train.eval_every_steps or 1,
            early_stop=recipe.train.early_stop,
        ),
        evaluate=_validation(plan, loaded, state) if recipe.train.eval_every_steps is not None else None,
        leaner=plan.leaner,
        trace=trace,
        say=say,
    )
    was_unlogged = False
    try:
        with _trackers(plan, run, first_step=state.step + 1) as track:
            for stats in steps:
                unlogged = run.append_step(asdict(stats))
                if unlogged is not None and not was_unlogged:
                    say(
                        f"step {stats.step}: {unlogged}. Training goes on; the line is written as soon as there is room"
                    )
                was_unlogged = unlogged is not None
                track(stats)
                is_last, is_stopped = state.is_over(stats.num_steps, early_stop=recipe.train.early_stop), should_stop()
                is_best = state.best is not None and state.best.step == stats.step
                with _clocked(spent, "checkpoints"):
                    if is_last or is_stopped:
                        _save(state, run, plan, loaded.base)
                    elif is_best or stats.step % recipe.train.save_every_steps == 0:
                        _try_to_save(state, run, plan, loaded.base, say)
                yield stats
                if is_stopped and not is_last:
                    return
    except TrainingStopped as error:
        if error.state_is_good and state.step > 0:
            _save(state, run, plan, loaded.base)
        raise
    except DoesNotFit as error:
        newest, _ = newest_valid(run.checkpoints)
        kept = (
            f"the checkpoint {newest.name} is kept, --resume continues from it"
            if newest
            else "no checkpoint was written yet"
        )
        raise DoesNotFit(f"{error}; {kept}") from error
    if trace is not None:
        say(_trace_in_words(trace))
    if state.step < len(sampler):
        say(
            f"stopped early after step {state.step} of {len(sampler)}: the validation loss has not fallen for "
            f"{recipe.train.early_stop} evaluations"
        )
    if tried is not None or not run.read_json("memory.json"):  # a sitting without a step has nothing to add
        run.write_json("memory.json", _memory(plan, loaded, state, run, tried))
    _publish(state, run, plan, loaded, say)


def _write_start(run: RunDir, plan: Plan, loaded: LoadedModel, data: Mapping[str, str]) -> None:
    """The first records; recipe.yaml, which makes the folder a run, comes last."""
    run.write_json("plan.json", plan.to_json_dict() | disk_speed(default_cache()))
    run.write_json(
        "env.json",
        {
            "base": str(loaded.base),
            "base_sha256": loaded.base_sha256,
            "base_files": files_of_base(loaded.base),
            "init_from": _start_of(plan.recipe),
            "device": plan.recipe.device,
            "card": plan.card.in_words,
            "num_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "data_sha256": dict(data),
            "versions": versions(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
    run.write_text(run.recipe.name, dump_recipe(plan.recipe))


def _start_of(recipe: Recipe) -> dict[str, str] | None:
    """Where the factors came from, and what they were."""
    folder = recipe.lora.init_from
    return None if folder is None else {"path": folder, "sha256": sha256_of_file(factors_file(Path(folder)))}


def _preflight(
    plan: Plan, state: TrainState, examples: Examples, sampler: StepSampler, say: Callable[[str], None]
) -> Preflight | None:
    """None where no step is left to train."""
    if state.step >= len(sampler):
        return None
    return try_largest_batch(
        state,
        lambda footprint: largest_step(examples, sampler, footprint.micro_batch_tokens, first=state.step),
        device=plan.device,
        leaner=plan.leaner,
        say=say,
    )


@contextmanager
def _clocked(spent: dict[str, float], what: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - begin


def _validation(plan: Plan, loaded: LoadedModel, state: TrainState) -> Callable[[], float]:
    """A function that measures the loss on the held-out rows as the model is now, by evaluation's own code."""
    examples = held_out_examples(plan, loaded.tokenizer)

    def measure() -> float:
        tokens = (state.footprint or plan.chosen.footprint).micro_batch_tokens
        return validation_loss(loaded.model, examples, device=plan.device, micro_batch_tokens=tokens, share=plan.shares)

    return measure


def _trackers(plan: Plan, run: RunDir, *, first_step: int) -> AbstractContextManager[Callable[[StepStats], None]]:
    return open_trackers(
        plan.recipe.train.trackers,
        run.trackers,
        run_name=run.path.resolve().name,
        first_step=first_step,
        settings=plan.recipe.model_dump(mode="json"),
    )


def _save(state: TrainState, run: RunDir, plan: Plan, base: Path) -> None:
    """A checkpoint, after the log up to its step is durable. Raises RunError when either cannot be written."""
    facts, keep = computed_with(plan.recipe, plan.card), plan.recipe.train.keep_checkpoints
    try:
        run.seal_steps()
        save_checkpoint(state, run.checkpoints, keep=keep, base=base, facts=facts)
    except (OSError, UserError, SafetensorError) as error:  # SafetensorError: what a full disk is called by save_file
        what = str(error).partition(". ")[0] if isinstance(error, UserError) else f"{run.checkpoints}: {error}"
        raise RunError(
            f"the checkpoint of step {state.step} cannot be written ({what}). Earlier ones are kept: free some room and "
            "continue with --resume"
        ) from error


def _try_to_save(state: TrainState, run: RunDir, plan: Plan, base: Path, say: Callable[[str], None]) -> None:
    """A failure costs this checkpoint only."""
    try:
        _save(state, run, plan, base)
    except RunError as error:
        say(f"{str(error).partition('. ')[0]}. Training goes on; the next one is tried when it is due")


def _resume(state: TrainState, run: RunDir, plan: Plan, say: Callable[[str], None]) -> None:
    checkpoint, problems = newest_valid(run.checkpoints, recipe_sha256=fixed_sha256(plan.recipe))
    for problem in problems:
        say(problem)
    if checkpoint is None:
        say("no checkpoint yet: training starts at step 1")
        run.cut_steps(0)
        return
    state.load(checkpoint)
    run.cut_steps(state.step)
    say(f"continues after step {state.step}, from {checkpoint}")
    for sentence in computed_otherwise(checkpoint, plan.recipe, plan.card):
        say(sentence)


def _publish(state: TrainState, run: RunDir, plan: Plan, loaded: LoadedModel, say: Callable[[str], None]) -> None:
    """Copy what the best checkpoint has trained to adapter/ or weights/, whole or not at all, and leave the model with it.

    A tokenizer that is not the base's goes with it, and generation settings that stop where rows do.
    Its manifest.json names the step and hashes the files.
    """
    name = folder_name(state.model)
    last_step, best = state.step, state.best
    checkpoint, problems = best_valid(run.checkpoints, best)
    for problem in problems:
        say(problem)
    assert checkpoint is not None  # the last step has just written one
    state.load(checkpoint)
    remove_folder(run.path / name)
    with staged_folder(run.path / name) as staging:
        for path in (checkpoint / name).iterdir():
            shutil.copyfile(path, staging / path.name)
        if plan.recipe.data.special_tokens:
            loaded.tokenizer.save_pretrained(str(staging))
        add_stop_tokens(staging, template_of(plan, loaded.tokenizer).stop_token_ids, base=loaded.base)
        write_manifest(staging, {"step": state.step})
    if best is not None and state.step == best.step:
        last = run.read_steps()[-1]["eval_loss"]
        others = f"; the last step's was {last:.3f}" if best.step != last_step else ", and it was the last"
        say(f"{name}/ is step {best.step}'s, with the lowest validation loss, {best.eval_loss:.3f}{others}")


def _memory(plan: Plan, loaded: LoadedModel, state: TrainState, run: RunDir, tried: Preflight | None) -> dict[str, Any]:
    """What memory.json holds."""
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    on_device, paged = state_bytes(state.optimizer)
    planned = as_json(plan.rehearsal(plan.method))
    found = memory_of_run(
        planned,
        loaded.static_bytes | {"optimizer_bytes": on_device},
        gradients_bytes=4 * trained,
        steps=run.read_steps(),
        tried=tried,
    )
    used = state.footprint or plan.chosen.footprint
    retries = (
        [] if used == plan.chosen.footprint else [f"memory ran out with {plan.chosen.footprint}; trained with {used}"]
    )
    return {
        "method": plan.method,
        "budget_bytes": plan.budget_bytes,
        **found,
        "paged_bytes": compared(planned["host_bytes"], paged),
        "allocator": allocator_statistics(plan.device),
        "retries": retries,
    }


def _trace_in_words(trace: Trace) -> str:
    if not trace.files:
        return "no timeline was recorded: that takes at least two steps, and on the CPU three, because one is measured"
    return f"timeline: {', '.join(map(str, trace.files))}; ui.perfetto.dev opens it (nothing is sent anywhere)"
