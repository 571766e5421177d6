"""Load the model of a plan onto its device, and tokenize its data, for training, scoring and merging."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.base.artefact import quantize_base, verify_artefact
from qlora_lite.base.source import context_window
from qlora_lite.data.examples import Examples, load_examples
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import DataError
from qlora_lite.evaluation.held_out import held_out_rows
from qlora_lite.files.cache import TOKENIZED
from qlora_lite.files.library_names import is_of_adapter
from qlora_lite.files.manifest import folder_weights_sha256
from qlora_lite.model.adapter import Lora, attach_adapter, load_adapter
from qlora_lite.model.factors import copy_factors
from qlora_lite.model.load import LoadedBase, load_base
from qlora_lite.model.policy import PLAIN
from qlora_lite.model.resident import residents
from qlora_lite.model.trained import make_trainable
from qlora_lite.plan import Plan, reading_of
from qlora_lite.training import apply_footprint
from qlora_lite.training.seeds import purpose_seed


@dataclass
class LoadedModel:
    """A model ready for training, questions or scoring."""

    model: PeftModel | PreTrainedModel
    tokenizer: Any
    base: Path  # folder of the base model: quantized in the cache, or the 16-bit source
    base_sha256: str
    static_bytes: dict[str, int]  # resident before the first step: weights, constants, adapter


def load_model(
    plan: Plan, *, adapter: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> LoadedModel:
    """Load the plan's base (quantized the first time) and put a new adapter on it, or the saved one at `adapter`.

    A new adapter copies the factors of the recipe's lora.init_from, if given. With method full there is no adapter, and every weight
    is trainable. `progress(done, total)` counts tensors while quantizing. Raises ModelError.
    """
    recipe = plan.recipe
    folder = base_folder(plan, progress=progress)
    sha256 = base_sha256(plan, folder)
    tokens = recipe.data.special_tokens
    footprint = plan.chosen.footprint
    # DoRA reads every weight when the adapter is put on, so they move to their homes afterwards.
    policy = PLAIN if recipe.lora.use_dora else footprint.policy
    base = load_base(folder, device=plan.device, compute=plan.types.compute, special_tokens=tokens, policy=policy)
    model: PeftModel | PreTrainedModel = base.model
    if adapter is not None:
        model = load_adapter(base.model, adapter, factor_dtype=plan.types.factors)
    elif recipe.method == "full":
        make_trainable(base.model)
    else:
        model = _new_adapter(plan, base)
    apply_footprint(model, footprint)
    tensors = residents(model)
    held = {part: sum({id(t): t.nbytes for t in tensors[part]}.values()) for part in ("weights", "quant_constants")}
    static_bytes = {
        **{f"{part}_bytes": num_bytes for part, num_bytes in held.items()},
        "adapter_bytes": sum(p.nbytes for name, p in model.named_parameters() if is_of_adapter(name)),
    }
    return LoadedModel(model, base.tokenizer, folder, sha256, static_bytes)


def load_plain(plan: Plan, folder: Path) -> LoadedModel:
    """Load a 16-bit model folder unchanged, with nothing trainable."""
    tokens = plan.recipe.data.special_tokens
    base = load_base(folder, device=plan.device, compute=plan.types.compute, special_tokens=tokens)
    return LoadedModel(base.model, base.tokenizer, folder, "", {})


def base_folder(plan: Plan, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the folder of the base: the quantized artefact, made on first use, or the 16-bit source."""
    if plan.quantization is None:
        return plan.source
    return quantize_base(plan.source, cache=plan.cache, quantization=plan.quantization, progress=progress)


def base_sha256(plan: Plan, folder: Path) -> str:
    return folder_weights_sha256(folder) if plan.quantization is None else verify_artefact(folder)


def training_examples(plan: Plan, tokenizer: Any) -> Examples:
    """Return the plan's training data, tokenized. Raises DataError."""
    data = plan.recipe.data
    return load_examples(
        data.train_files,
        tokenizer,
        reading_of(plan.recipe, plan.source),
        max_seq_length=_length(plan),
        cache_dir=plan.cache / TOKENIZED,
    )


def held_out_examples(plan: Plan, tokenizer: Any, *, path: Path | str | None = None) -> Examples:
    """Return the held-out data of data.eval (at most eval.num_examples) or of `path`, tokenized. Raises DataError."""
    data = plan.recipe.data
    file = path or data.eval
    if file is None:
        raise DataError("data.eval: null, so there are no held-out rows to score. Set data.eval, or give --data FILE")
    longest = plan.recipe.eval.max_seq_length
    assert isinstance(longest, int)  # a plan has no auto
    return held_out_rows(
        file,
        tokenizer,
        replace(reading_of(plan.recipe, plan.source), num_rows=plan.recipe.eval.num_examples if path is None else None),
        max_seq_length=longest,
        text_length=_length(plan),
        window=context_window(plan.rehearsals.config),
        cache_dir=plan.cache / TOKENIZED,
    )


def template_of(plan: Plan, tokenizer: Any) -> ChatTemplate:
    """Return the chat template of the plan's model. Raises ModelError."""
    return ChatTemplate(tokenizer, reading_of(plan.recipe, plan.source).vocabulary)


def _new_adapter(plan: Plan, base: LoadedBase) -> PeftModel:
    lora = plan.recipe.lora
    adapted = attach_adapter(
        base.model,
        Lora(
            lora.r,
            lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            modules_to_save=lora.modules_to_save,
        ),
        new_token_ids=base.new_token_ids,
        factor_dtype=plan.types.factors,
        seed=purpose_seed(plan.recipe.train.seed, "factors"),
    )
    if lora.init_from is not None:
        copy_factors(adapted, Path(lora.init_from))
    return adapted


def _length(plan: Plan) -> int:
    length = plan.recipe.data.max_seq_length
    assert isinstance(length, int)  # a plan has no auto
    return length
