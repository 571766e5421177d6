"""The Python interface: load_recipe -> make_plan -> load_model -> train -> evaluate -> merge. No screen, no exit codes.

The command line (pipeline.py) uses nothing else. Everything a run writes goes through `RunDir`.
"""

import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from qlora_lite.data.batches import StepSampler, largest_step
from qlora_lite.data.examples import Examples, load_examples
from qlora_lite.data.read import format_of_held_out
from qlora_lite.data.template import Encoded
from qlora_lite.errors import DataError, DoesNotFit, RunError, TrainingStopped
from qlora_lite.evaluate import EvalResult, evaluate_model, validation_loss
from qlora_lite.merge import MergeResult
from qlora_lite.merge import merge as merge_files
from qlora_lite.model.adapter import attach_adapter, load_adapter
from qlora_lite.model.artefact import quantize_base, verify_artefact
from qlora_lite.model.base import LoadedBase, load_base, load_tokenizer
from qlora_lite.model.factors import FACTORS_FILE, copy_factors
from qlora_lite.model.manifest import folder_weights_sha256, sha256_of_file, write_manifest
from qlora_lite.model.quantization import stored_quantization
from qlora_lite.model.source import read_config
from qlora_lite.model.staging import staged_folder
from qlora_lite.model.trained import folder_name, make_trainable
from qlora_lite.plan import Plan, as_json, make_plan
from qlora_lite.recipe import Recipe, dump_recipe, load_recipe, load_run_recipe
from qlora_lite.run_dir import RunDir
from qlora_lite.run_memory import memory_of_run
from qlora_lite.train import (
    Preflight,
    StepStats,
    TrainState,
    apply_footprint,
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
from qlora_lite.train.seeds import purpose_seed

PROOF_TOKENS = 2500  # held-out rows of a proof by default: as many as have together about so many tokens
Which = Literal["base", "adapter", "merged"]

__all__ = ["LoadedModel", "evaluate", "load_model", "load_recipe", "make_plan", "merge", "open_run", "train"]


@dataclass
class LoadedModel:
    """A model ready to train, ask or score."""

    model: PeftModel | PreTrainedModel
    tokenizer: Any
    base: Path  # folder of the base model: quantized in the cache, or in 16 bits where it was found
    base_sha256: str
    static_bytes: dict[str, int]  # resident before the first step: weights, constants, adapter


def load_model(
    plan: Plan, *, adapter: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> LoadedModel:
    """Load the plan's base (quantized the first time) and put a new adapter on it, or the saved one at `adapter`.

    A new one has the factors of the recipe's lora.init_from, where that is given. With method full there is no adapter, and
    every weight is trainable. `progress(done, total)` counts tensors while quantizing. Raises ModelError.
    """
    recipe = plan.recipe
    folder = base_folder(plan, progress=progress)
    sha256 = _base_sha256(plan, folder)
    tokens = recipe.data.special_tokens
    base = load_base(folder, device=plan.device, compute=plan.types.compute, special_tokens=tokens)
    model: PeftModel | PreTrainedModel = base.model
    if adapter is not None:
        model = load_adapter(base.model, adapter, factor_dtype=plan.types.factors)
    elif recipe.method == "full":
        make_trainable(base.model)
    else:
        model = _new_adapter(plan, base)
    apply_footprint(model, plan.chosen.footprint)
    return LoadedModel(model, base.tokenizer, folder, sha256, _static_bytes(base, model))


def base_folder(plan: Plan, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder that the base is read from: the quantized artefact, made the first time, or the 16-bit source itself."""
    if plan.quantization is None:
        return plan.source
    return quantize_base(plan.source, cache=plan.cache, quantization=plan.quantization, progress=progress)


def training_examples(plan: Plan, tokenizer: Any) -> Examples:
    """The plan's training rows, tokenized. Raises DataError."""
    data = plan.recipe.data
    return load_examples(
        data.train_files,
        tokenizer,
        format=data.format,
        num_rows=data.num_train,
        no_answer_text=data.no_answer_text,
        max_seq_length=_length(plan),
        cache_dir=plan.cache / "data",
    )


def held_out_examples(plan: Plan, tokenizer: Any, *, path: Path | str | None = None) -> Examples:
    """The rows of data.eval or `path`, tokenized: at most eval.num_examples of data.eval.

    A file that has not the columns of data.format is of the format that its own columns say.

    Raises DataError.
    """
    data = plan.recipe.data
    file = path or data.eval
    if file is None:
        raise DataError("data.eval: null, so there are no held-out rows to score. Set data.eval, or give --data FILE")
    return load_examples(
        file,
        tokenizer,
        format=format_of_held_out(file, format=data.format),
        num_rows=plan.recipe.eval.num_examples if path is None else None,
        no_answer_text=data.no_answer_text,
        max_seq_length=_length(plan),
        cache_dir=plan.cache / "data",
    )


def train(
    plan: Plan,
    loaded: LoadedModel,
    run_dir: Path | str,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[StepStats]:
    """Train and keep `run_dir`: one `StepStats` per optimizer step, checkpoints on the way, adapter/ (or weights/) at the end.

    `resume` continues from the newest whole checkpoint. When `should_stop()` becomes true, the step that is under way is
    finished, a checkpoint written, and the generator ends. A finished run has no steps left. Afterwards `loaded` holds the
    factors that adapter/ holds: those of the lowest validation loss where the recipe asks for evaluations, else the last.
    Before the first step the largest micro-batch is tried; one that runs out of memory, then or later, is repeated with leaner
    settings, said through `say`. Raises RunError, DataError, TrainingStopped, DoesNotFit, or UserError for a tracker that is not
    installed.
    """
    recipe = plan.recipe
    refuse_missing_trackers(recipe.train.trackers)
    run = RunDir.open(run_dir) if resume else RunDir.create(run_dir)
    if resume:
        refuse_other_recipe(run, recipe)
        _refuse_other_base(run, loaded.base_sha256)
    examples = training_examples(plan, loaded.tokenizer)
    for sentence in (*examples.account("training rows", limit="data.num_train"), *examples.counts.notes):
        say(sentence)
    if recipe.data.eval is not None and Path(recipe.data.eval).exists():
        for sentence in held_out_examples(plan, loaded.tokenizer).account("held-out rows", limit="eval.num_examples"):
            say(sentence)
    sampler = StepSampler(
        len(examples),
        examples_per_step=recipe.train.examples_per_step,
        epochs=recipe.train.epochs or 1.0,
        max_steps=recipe.train.max_steps,
        seed=recipe.train.seed,
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
        _resume(state, run, say)
    else:
        _write_start(run, plan, loaded)
    state.footprint = state.footprint or plan.chosen.footprint
    tried = _preflight(plan, state, examples, sampler, say)
    steps = train_steps(
        state,
        examples,
        sampler,
        device=plan.device,
        footprint=plan.chosen.footprint,
        learning_rate=recipe.train.learning_rate,
        schedule=recipe.train.schedule,
        warmup_ratio=recipe.train.warmup_ratio,
        max_grad_norm=recipe.train.max_grad_norm,
        evaluate=_validation(plan, loaded, state) if recipe.train.eval_every_steps is not None else None,
        eval_every_steps=recipe.train.eval_every_steps or 1,
        early_stop=recipe.train.early_stop,
        leaner=plan.leaner,
        say=say,
    )
    try:
        with _trackers(plan, run, first_step=state.step + 1) as track:
            for stats in steps:
                run.append_step(asdict(stats))
                track(stats)
                is_last, is_stopped = state.is_over(stats.num_steps, early_stop=recipe.train.early_stop), should_stop()
                is_best = state.best is not None and state.best.step == stats.step
                if is_last or is_stopped or is_best or stats.step % recipe.train.save_every_steps == 0:
                    _save(state, run, recipe, loaded.base)
                yield stats
                if is_stopped and not is_last:
                    return
    except TrainingStopped as error:
        if error.state_is_good and state.step > 0:
            _save(state, run, recipe, loaded.base)
        raise
    except DoesNotFit as error:
        newest, _ = newest_valid(run.checkpoints)
        kept = (
            f"the checkpoint {newest.name} is kept, --resume continues from it"
            if newest
            else "no checkpoint was written yet"
        )
        raise DoesNotFit(f"{error}; {kept}") from error
    if state.step < len(sampler):
        say(
            f"stopped early after step {state.step} of {len(sampler)}: the validation loss has not fallen for "
            f"{recipe.train.early_stop} evaluations"
        )
    if tried is not None or not run.read_json("memory.json"):  # a sitting without a step has nothing to add
        run.write_json("memory.json", _memory(plan, loaded, state, run, tried))
    _publish(state, run, loaded.tokenizer if recipe.data.special_tokens else None, say)


def evaluate(
    plan: Plan,
    loaded: LoadedModel,
    *,
    data: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score `loaded` on the plan's held-out rows, or on the file `data`. Raises DataError when there are none."""
    return evaluate_model(
        loaded.model,
        loaded.tokenizer,
        held_out_examples(plan, loaded.tokenizer, path=data),
        device=plan.device,
        no_answer_text=plan.recipe.data.no_answer_text,
        max_new_tokens=plan.recipe.eval.max_new_tokens,
        micro_batch_tokens=plan.chosen.footprint.micro_batch_tokens,
        batch_tokens=int(plan.recipe.memory.eval_batch_tokens),
        progress=progress,
    )


def merge(plan: Plan, run_dir: Path | str, out: Path | str | None = None) -> MergeResult:
    """Merge the run's adapter into a 16-bit checkpoint at `out` (default: merged/ of the run), with proof.

    The base is the one that training saw, dequantized, or with merge.base: original the 16-bit one it was made from.
    Raises ProofFailed when the merged model is not the adapter model, RunError when the run has no adapter.
    """
    run, recipe = RunDir.open(run_dir), plan.recipe
    if recipe.method == "full":
        raise RunError(
            f"{run.path}: method full trains the weights themselves, so there is nothing to merge: {run.weights} is an "
            "ordinary checkpoint already"
        )
    folder = run_base(plan, run)
    is_original = recipe.merge.base == "original"
    if is_original and stored_quantization(read_config(plan.source), plan.source) is not None:
        raise RunError(
            f"merge.base: original, and {plan.source} has no 16-bit original. Use --set merge.base=dequantized"
        )
    rows = _proof_rows(plan, load_tokenizer(folder, special_tokens=recipe.data.special_tokens))
    return merge_files(
        plan.source if is_original else folder,
        _finished(run),
        Path(out) if out is not None else run.merged,
        rows,
        dtype=recipe.merge.dtype,
        rounding=recipe.merge.rounding,
        scale=recipe.merge.scale,
        seed=purpose_seed(recipe.train.seed, "rounding"),
        compute_dtype=None if is_original else plan.types.name,
        device=plan.device,
    )


def open_run(run_dir: Path | str, *, overrides: Sequence[str] = ()) -> tuple[RunDir, Plan]:
    """A run's folder and the plan it was made with; `overrides` may say how it is merged and scored now (`merge.scale=0.5`).

    Raises RunError, RecipeError or ModelError.
    """
    run = RunDir.open(run_dir)
    trained_with = [override for override in overrides if not override.startswith(("merge.", "eval."))]
    if trained_with:
        raise RunError(
            f"{run.path}: was trained with its own recipe, so {trained_with[0]} cannot be set any more; only merge.* and eval.* can"
        )
    return run, make_plan(load_run_recipe(run.recipe, overrides=overrides))


def run_models(plan: Plan, run: RunDir, wanted: Sequence[Which]) -> Iterator[LoadedModel]:
    """Each of the run's models in turn, to be used until the next one is asked for; base and adapter share one set of weights.

    "adapter" is the tuned model also where every weight was trained. Raises RunError for what is not there yet.
    """
    shared: LoadedModel | None = None
    for which in wanted:
        shared = None if which == "merged" else shared  # one model in memory at a time
        loaded = shared or _load_run_model(plan, run, which, wanted)
        shared = loaded if isinstance(loaded.model, PeftModel) else None
        with _adapter_off(loaded) if which == "base" else nullcontext():
            yield loaded
        del loaded


def _load_run_model(plan: Plan, run: RunDir, which: Which, wanted: Sequence[Which]) -> LoadedModel:
    if which == "merged":
        if not (run.merged / "config.json").is_file():
            raise RunError(f"{run.merged}: not there yet. Make it with: qlora-lite merge {run.path}")
        return load_plain(plan, run.merged)
    folder = run_base(plan, run)
    if plan.recipe.method == "full":
        return load_plain(plan, folder if which == "base" else _finished(run))
    if "adapter" not in wanted:
        return load_model(_without_start(plan))
    return load_model(plan, adapter=_finished(run))


def load_plain(plan: Plan, folder: Path) -> LoadedModel:
    """A 16-bit model folder as it is, nothing trainable."""
    base = load_base(folder, device=plan.device, compute=plan.types.compute)
    return LoadedModel(base.model, base.tokenizer, folder, "", {})


@contextmanager
def _adapter_off(loaded: LoadedModel) -> Iterator[None]:
    """The base model alone inside this block."""
    with loaded.model.disable_adapter() if isinstance(loaded.model, PeftModel) else nullcontext():
        yield


def run_base(plan: Plan, run: RunDir) -> Path:
    """The base the run was trained on. Raises RunError when what is there now is another one."""
    folder = base_folder(plan)
    _refuse_other_base(run, _base_sha256(plan, folder))
    return folder


def refuse_other_recipe(run: RunDir, recipe: Recipe) -> None:
    """Raise RunError for a resolved `recipe` that is not the run's: another one would silently mix two runs."""
    before, now = (r.model_dump(mode="json") for r in (load_run_recipe(run.recipe), recipe))
    changed = [
        f"{section}.{key} was {before[section][key]}, is {value}"
        if key
        else f"{section} was {before[section]}, is {value}"
        for section, values in now.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if (before[section][key] if key else before[section]) != value
    ]
    if changed:
        raise RunError(f"{run.path}: cannot resume with another recipe: {'; '.join(changed)}. Start a new run instead")


def _refuse_other_base(run: RunDir, now: str) -> None:
    then = run.read_json("env.json").get("base_sha256")
    if then is not None and now != then:
        raise RunError(
            f"{run.path}: was trained on another quantized base (SHA-256 {then[:12]}..., now {now[:12]}...). "
            "Quantizing again may round differently; put the original cache back, or train again"
        )


def _base_sha256(plan: Plan, folder: Path) -> str:
    return folder_weights_sha256(folder) if plan.quantization is None else verify_artefact(folder)


def _new_adapter(plan: Plan, base: LoadedBase) -> PeftModel:
    lora, targets = plan.recipe.lora, plan.recipe.lora.target_modules
    adapted = attach_adapter(
        base.model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save,
        new_token_ids=base.tokenizer.convert_tokens_to_ids(list(plan.recipe.data.special_tokens)),
        factor_dtype=plan.types.factors,
        seed=purpose_seed(plan.recipe.train.seed, "factors"),
    )
    if lora.init_from is not None:
        copy_factors(adapted, Path(lora.init_from))
    return adapted


def _without_start(plan: Plan) -> Plan:
    """The plan with a new adapter that starts at zero: the base alone does not need lora.init_from, which may be gone."""
    lora = plan.recipe.lora.model_copy(update={"init_from": None})
    return replace(plan, recipe=plan.recipe.model_copy(update={"lora": lora}))


def _length(plan: Plan) -> int:
    length = plan.recipe.data.max_seq_length
    assert isinstance(length, int)  # a plan has no auto
    return length


def _static_bytes(base: LoadedBase, model: PeftModel | PreTrainedModel) -> dict[str, int]:
    ours = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
    adapter = sum(p.nbytes for name, p in model.named_parameters() if any(part in name for part in ours))
    weights = {"weights_bytes": base.weights_bytes, "quant_constants_bytes": base.quant_constants_bytes}
    return {**weights, "adapter_bytes": adapter}


def _write_start(run: RunDir, plan: Plan, loaded: LoadedModel) -> None:
    run.recipe.write_text(dump_recipe(plan.recipe), encoding="utf-8")
    run.write_json("plan.json", plan.to_json_dict())
    packages = ("qlora-lite", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    run.write_json(
        "env.json",
        {
            "base": str(loaded.base),
            "base_sha256": loaded.base_sha256,
            "init_from": _start_of(plan.recipe),
            "device": plan.device,
            "num_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: version(name) for name in packages},
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _start_of(recipe: Recipe) -> dict[str, str] | None:
    """Where the factors came from, and what they were."""
    folder = recipe.lora.init_from
    return None if folder is None else {"path": folder, "sha256": sha256_of_file(Path(folder) / FACTORS_FILE)}


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


def _validation(plan: Plan, loaded: LoadedModel, state: TrainState) -> Callable[[], float]:
    """A function that measures the loss on the held-out rows as the model is now, by evaluation's own code."""
    examples = held_out_examples(plan, loaded.tokenizer)

    def measure() -> float:
        tokens = (state.footprint or plan.chosen.footprint).micro_batch_tokens
        return validation_loss(loaded.model, examples, device=plan.device, micro_batch_tokens=tokens)

    return measure


def _trackers(plan: Plan, run: RunDir, *, first_step: int) -> AbstractContextManager[Callable[[StepStats], None]]:
    return open_trackers(
        plan.recipe.train.trackers,
        run.trackers,
        run_name=run.path.resolve().name,
        first_step=first_step,
        settings=plan.recipe.model_dump(mode="json"),
        device=plan.device,
    )


def _save(state: TrainState, run: RunDir, recipe: Recipe, base: Path) -> None:
    try:
        save_checkpoint(state, run.checkpoints, keep=recipe.train.keep_checkpoints, base=base)
    except SafetensorError as error:  # what a full disk is called by save_file
        raise RunError(
            f"{run.checkpoints}: the checkpoint of step {state.step} cannot be written ({error}). Earlier ones are kept: "
            "free some room and continue with --resume"
        ) from error


def _resume(state: TrainState, run: RunDir, say: Callable[[str], None]) -> None:
    checkpoint, problems = newest_valid(run.checkpoints)
    for problem in problems:
        say(problem)
    if checkpoint is None:
        say("no checkpoint yet: training starts at step 1")
        run.cut_steps(0)
        return
    state.load(checkpoint)
    run.cut_steps(state.step)
    say(f"continues after step {state.step}, from {checkpoint}")


def _publish(state: TrainState, run: RunDir, tokenizer: Any | None, say: Callable[[str], None]) -> None:
    """Copy what the best checkpoint has trained to adapter/ or weights/, whole or not at all, and leave the model with it.

    A `tokenizer` that is not the base's goes with it. Its manifest.json names the step and hashes the files.
    """
    name = folder_name(state.model)
    last_step, best = state.step, state.best
    checkpoint, problems = best_valid(run.checkpoints, best)
    for problem in problems:
        say(problem)
    assert checkpoint is not None  # the last step has just written one
    state.load(checkpoint)
    shutil.rmtree(run.path / name, ignore_errors=True)
    with staged_folder(run.path / name) as staging:
        for path in (checkpoint / name).iterdir():
            shutil.copyfile(path, staging / path.name)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        write_manifest(staging, {"step": state.step})
    if best is not None and state.step == best.step:
        last = run.read_steps()[-1]["eval_loss"]
        others = f"; the last step's was {last:.3f}" if best.step != last_step else ", and it was the last"
        say(f"{name}/ is step {best.step}'s, with the lowest validation loss, {best.eval_loss:.3f}{others}")


def _finished(run: RunDir) -> Path:
    if run.trained is None:
        raise RunError(f"{run.path}: training is not finished, so there is no tuned model. Continue it with --resume")
    return run.trained


def _proof_rows(plan: Plan, tokenizer: Any) -> list[Encoded]:
    """Held-out rows (training rows where there are none) up to PROOF_TOKENS, or as many as merge.proof says."""
    has_held_out = plan.recipe.data.eval is not None
    examples = held_out_examples(plan, tokenizer) if has_held_out else training_examples(plan, tokenizer)
    asked = plan.recipe.merge.proof
    if isinstance(asked, int):
        return [examples.encoded(i) for i in range(min(asked, len(examples)))]
    rows: list[Encoded] = []
    tokens = 0
    for i in range(len(examples)):
        tokens += int(examples.lengths[i])
        if rows and tokens > PROOF_TOKENS:
            break
        rows.append(examples.encoded(i))
    return rows


def _memory(plan: Plan, loaded: LoadedModel, state: TrainState, run: RunDir, tried: Preflight | None) -> dict[str, Any]:
    """What memory.json holds."""
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    found = memory_of_run(
        as_json(plan.rehearsal(plan.method)),
        loaded.static_bytes | {"optimizer_bytes": state_bytes(state.optimizer)},
        gradients_bytes=4 * trained,
        steps=run.read_steps(),
        tried=tried,
    )
    used = state.footprint or plan.chosen.footprint
    retries = (
        [] if used == plan.chosen.footprint else [f"memory ran out with {plan.chosen.footprint}; trained with {used}"]
    )
    return {"method": plan.method, "budget_bytes": plan.budget_bytes, **found, "retries": retries}
