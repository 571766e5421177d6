"""The Python interface: load_recipe -> make_plan -> load_model -> train -> evaluate -> merge. No screen, no exit codes.

The commands use these functions too. runs/loading.py loads model and data, runs/session.py trains; operations on finished runs are here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel

from qlora_lite.base.quantization import stored_quantization
from qlora_lite.base.source import read_config
from qlora_lite.data.template import Encoded
from qlora_lite.errors import RunError, UserError
from qlora_lite.evaluation import EvalResult, EvalSettings, evaluate_model
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.merging import MergeResult
from qlora_lite.merging import merge as merge_files
from qlora_lite.merging.adapter_proof import EffectLost
from qlora_lite.merging.adapter_proof import effect_lost as adapters_effect_lost
from qlora_lite.merging.proof import PROOF_TOKENS
from qlora_lite.merging.write import MergeOptions
from qlora_lite.model.load import load_tokenizer
from qlora_lite.plan import Plan, make_plan
from qlora_lite.recipe import load_recipe, load_run_recipe
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.loading import (
    LoadedModel,
    base_folder,
    base_sha256,
    held_out_examples,
    load_model,
    load_plain,
    template_of,
    training_examples,
)
from qlora_lite.runs.resume import go_on_with, refuse_missing_base, refuse_other_base, refuse_other_recipe
from qlora_lite.runs.session import train
from qlora_lite.runs.verify import refuse_damaged
from qlora_lite.training.seeds import purpose_seed

Which = Literal["base", "adapter", "merged"]
WHICH: tuple[Which, ...] = ("base", "adapter", "merged")

__all__ = [
    "WHICH",
    "EffectLost",
    "LoadedModel",
    "effect_lost",
    "evaluate",
    "go_on_with",
    "load_model",
    "load_plain",
    "load_recipe",
    "make_plan",
    "merge",
    "model_of_run",
    "open_run",
    "refuse_missing_base",
    "refuse_other_recipe",
    "run_base",
    "run_models",
    "template_of",
    "train",
    "training_examples",
]  # fmt: skip


def evaluate(
    plan: Plan,
    loaded: LoadedModel,
    *,
    data: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score `loaded` on the plan's held-out rows, or on the file `data`. Raises DataError if neither exists."""
    return evaluate_model(
        loaded.model,
        loaded.tokenizer,
        held_out_examples(plan, loaded.tokenizer, path=data),
        EvalSettings(
            plan.device,
            plan.recipe.data.no_answer_text,
            plan.recipe.eval.max_new_tokens,
            plan.chosen.footprint.micro_batch_tokens,
            batch_tokens=int(plan.recipe.memory.eval_batch_tokens),
            share_prefixes=plan.share_prefixes,
        ),
        template=template_of(plan, loaded.tokenizer),
        progress=progress,
    )


def merge(plan: Plan, run_dir: Path | str, out: Path | str | None = None) -> MergeResult:
    """Merge the run's adapter into a 16-bit checkpoint at `out` (default: merged/ of the run), with proof.

    The base is that of training, dequantized, or with merge.base: original its 16-bit source. Complete output of an earlier, interrupted
    call with equal settings is reused. Raises ProofFailed if the merged model differs from the adapter model, RunError if the run has no
    adapter.
    """
    run, recipe = RunDir.open(run_dir), plan.recipe
    if recipe.method == "full":
        raise RunError(
            f"{run.path}: method full trains all weights, so there is nothing to merge: {run.weights} is already an ordinary checkpoint"
        )
    folder = run_base(plan, run)
    is_original = recipe.merge.base == "original"
    if is_original and stored_quantization(read_config(plan.source), plan.source) is not None:
        raise RunError(
            f"merge.base: original, but {plan.source} has no 16-bit original. Use --set merge.base=dequantized"
        )
    tokenizer = load_tokenizer(folder, special_tokens=recipe.data.special_tokens)
    return merge_files(
        plan.source if is_original else folder,
        _finished(run),
        Path(out) if out is not None else run.merged,
        _proof_rows(plan, tokenizer),
        stop_tokens=template_of(plan, tokenizer).stop_token_ids,
        device=plan.device,
        options=MergeOptions(
            dtype=recipe.merge.dtype,
            rounding=recipe.merge.rounding,
            scale=recipe.merge.scale,
            seed=purpose_seed(recipe.train.seed, "rounding"),
            compute_dtype=None if is_original else plan.types.name,
        ),
    )


def effect_lost(plan: Plan, run: RunDir, adapter: Path, other: Path) -> EffectLost:
    """Return the share of an adapter's effect on held-out rows that the adapter folder `other` loses. Raises ModelError, RunError."""
    folder = run_base(plan, run)
    return adapters_effect_lost(
        folder,
        adapter,
        other,
        _proof_rows(plan, load_tokenizer(folder, special_tokens=plan.recipe.data.special_tokens)),
        compute_dtype=plan.types.name,
        device=plan.device,
    )


def open_run(run_dir: Path | str, *, overrides: Sequence[str] = (), base: Path | None = None) -> tuple[RunDir, Plan]:
    """-> (run, its plan); `overrides` may change how it is merged and scored (`merge.scale=0.5`).

    `base` is the new folder of a moved base; its hash is compared when it is loaded.

    Raises RunError, RecipeError or ModelError.
    """
    run = RunDir.open(run_dir)
    trained_with = [override for override in overrides if not override.startswith(("merge.", "eval."))]
    if trained_with:
        raise RunError(
            f"{run.path}: its recipe is fixed by training, so {trained_with[0]} cannot be set; only merge.* and eval.* can"
        )
    recipe = load_run_recipe(run.recipe, overrides=overrides)
    if base is None:
        refuse_missing_base(run, recipe)
    return run, make_plan(recipe, is_record=True, base=base)


def run_models(plan: Plan, run: RunDir, wanted: Sequence[Which]) -> Iterator[LoadedModel]:
    """Yield the run's models one at a time, each valid until the next; base and adapter share one set of weights.

    "adapter" is the tuned model, also if every weight was trained. Raises RunError for a model that does not exist yet.
    """
    shared: LoadedModel | None = None
    for which in wanted:
        shared = None if which == "merged" else shared  # one model in memory at a time
        loaded = shared or _load_run_model(plan, run, which, wanted)
        shared = loaded if isinstance(loaded.model, PeftModel) else None
        with shared.model.disable_adapter() if which == "base" and shared is not None else nullcontext():
            yield loaded
        del loaded


def model_of_run(word: str) -> Which:
    """Parse the value of `--which`. Raises UserError."""
    for which in WHICH:
        if word == which:
            return which
    raise UserError(f"--which: expected one of {', '.join(WHICH)}, got {word!r}")


def _load_run_model(plan: Plan, run: RunDir, which: Which, wanted: Sequence[Which]) -> LoadedModel:
    if which == "merged":
        if not (run.merged / CONFIG_FILE).is_file():
            raise RunError(f"{run.merged}: does not exist yet. Create it with: qlora-lite merge {run.path}")
        refuse_damaged(run.merged)
        return load_plain(plan, run.merged)
    folder = run_base(plan, run)
    if plan.recipe.method == "full":
        return load_plain(plan, folder if which == "base" else _finished(run))
    if "adapter" not in wanted:
        return load_model(_without_start(plan))
    return load_model(plan, adapter=_finished(run))


def run_base(plan: Plan, run: RunDir) -> Path:
    """Return the folder of the run's base. Raises RunError if the base has changed since training."""
    folder = base_folder(plan)
    refuse_other_base(run, base_sha256(plan, folder), folder)
    return folder


def _without_start(plan: Plan) -> Plan:
    """Return the plan without lora.init_from: the base alone does not need that adapter, which may be gone."""
    lora = plan.recipe.lora.model_copy(update={"init_from": None})
    return replace(plan, recipe=plan.recipe.model_copy(update={"lora": lora}))


def _finished(run: RunDir) -> Path:
    """Return adapter/ or weights/, verified. Raises RunError if training is not finished or a file has changed."""
    if run.trained is None:
        raise RunError(f"{run.path}: training is not finished, so there is no tuned model. Continue it with --resume")
    refuse_damaged(run.trained)
    return run.trained


def _proof_rows(plan: Plan, tokenizer: Any) -> list[Encoded]:
    """Return held-out examples (without held-out data, training examples) of up to PROOF_TOKENS tokens, or merge.proof examples."""
    has_held_out = plan.recipe.data.eval is not None
    examples = held_out_examples(plan, tokenizer) if has_held_out else training_examples(plan, tokenizer)
    asked = plan.recipe.merge.proof
    # Prefer examples no longer than training's: the plan of the proof assumes it, and scoring accepts longer ones too.
    usual = [i for i in range(len(examples)) if examples.lengths[i] <= plan.chosen.length] or range(len(examples))
    if isinstance(asked, int):
        return [examples.encoded(i) for i in usual[:asked]]
    chosen: list[Encoded] = []
    tokens = 0
    for i in usual:
        tokens += int(examples.lengths[i])
        if chosen and tokens > PROOF_TOKENS:
            break
        chosen.append(examples.encoded(i))
    return chosen
