"""Turn every `auto` of a recipe into a value, out loud: each choice comes with its reason."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite.data.examples import load_examples
from qlora_lite.data.inspect import propose_max_seq_length
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.errors import DataError, ModelError
from qlora_lite.model.base import load_tokenizer
from qlora_lite.model.bring import default_cache
from qlora_lite.model.dtypes import NumberTypes, choose_device, choose_types
from qlora_lite.model.quantization import Quantization, stored_quantization
from qlora_lite.model.source import context_window, find_base, load_config, read_config
from qlora_lite.plan.compare import METHODS, Comparison, as_json, own_method
from qlora_lite.plan.rehearsal import NF4, MicroBatch, Rehearsal, Settings
from qlora_lite.recipe import Recipe
from qlora_lite.recipe.hub_names import commit_of, is_hub_name

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}  # enough to hide dequantizing the weights behind the matrix products


@dataclass(frozen=True)
class Plan:
    """What will be run. `recipe` has no `auto` but the memory budget, which this version takes from the device."""

    recipe: Recipe
    source: Path  # 16-bit model folder
    cache: Path
    device: str
    types: NumberTypes
    budget_bytes: int
    comparison: Comparison  # rehearses when it is asked
    batch: MicroBatch
    reasons: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """What the recipe's own method will need on the device."""
        return self.rehearsal(own_method(self.recipe.method, self.recipe.train.optimizer)).peak_bytes

    def rehearsal(self, method: str) -> Rehearsal:
        """Of one of METHODS, with this plan's settings and largest micro-batch."""
        return self.comparison.rehearse(method, self.batch)

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen weights are stored; None in 16 bits."""
        model = self.recipe.model
        return None if model.quantization == "none" else Quantization(model.quantization, model.double_quant)

    def to_json_dict(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        full = self.rehearsal("full").peak_bytes
        return {
            "model": self.recipe.model.base,
            "budget_bytes": self.budget_bytes,
            "fits": self.peak_bytes <= self.budget_bytes,
            "settings": self.recipe.model_dump(mode="json"),
            "reasons": list(self.reasons),
            "methods": {method: as_json(self.rehearsal(method)) for method in METHODS},
            "savings_vs_full": {"bytes": full - self.peak_bytes, "percent": 100 * (1 - self.peak_bytes / full)},
            "max_seq_length": self.recipe.data.max_seq_length,
            "checkpoint_bytes": self.comparison.checkpoint_bytes(self.batch),
        }


def make_plan(recipe: Recipe, *, cache: Path | None = None) -> Plan:
    """Resolve `recipe` for this machine. Reads config, tokenizer and data, no weights (a GGUF is converted on first use).

    Raises UserError subclasses for a model, a device or data that cannot be used.
    """
    cache = cache or default_cache()
    device, device_reason = choose_device(recipe.device)
    types = choose_types(recipe.model.dtype, device)
    source = find_base(recipe.model.base, cache=cache, revision=recipe.model.revision)
    commit = commit_of(source) if is_hub_name(recipe.model.base) else None
    config = load_config(source)
    quantization, quantization_reason = _choose_quantization(recipe, source)
    data_format, format_reason = _choose_format(recipe)
    length, length_reason, label_share = choose_length(recipe, source, cache, limit=context_window(config))
    micro_batch, micro_batch_reason = choose_micro_batch(recipe.train.micro_batch_tokens, device, length)
    checkpointing = recipe.memory.gradient_checkpointing is not False
    _refuse_without_bf16(recipe, types)
    resolved = recipe.model_copy(
        update={
            "device": device,
            "model": recipe.model.model_copy(
                update={"revision": commit, "dtype": types.name, "attention": "sdpa", **quantization}
            ),
            "data": recipe.data.model_copy(
                update={"format": data_format, "max_seq_length": length, "share_prefixes": False}
            ),
            "train": recipe.train.model_copy(update={"micro_batch_tokens": micro_batch}),
            "memory": recipe.memory.model_copy(update={"gradient_checkpointing": checkpointing}),
        }
    )
    settings = settings_of(resolved, device=device, types=types)
    reasons = [
        *recipe.notes,
        *([f"model.revision: {commit}, {_revision_reason(recipe.model.revision)}"] if commit else []),
        f"device: {device_reason}",
        f"model.dtype: {types.reason}",
        f"model.quantization: {quantization_reason}",
        "model.attention: sdpa, example by example on packed rows",
        f"data.format: {data_format}: {format_reason}",
        f"data.max_seq_length: {length_reason}",
        "data.share_prefixes: off; this version trains every question with its own copy of the passage",
        f"train.micro_batch_tokens: {micro_batch_reason}",
        f"memory.gradient_checkpointing: {_checkpointing_reason(recipe.memory.gradient_checkpointing)}",
    ]
    if device == "cpu" and recipe.train.optimizer.startswith("paged"):
        reasons.append(
            f"train.optimizer: {recipe.train.optimizer} pages on CUDA only; on the CPU its state stays where it is"
        )
    comparison, batch = Comparison(config, settings), largest_batch(micro_batch, length, label_share)
    return Plan(resolved, source, cache, device, types, device_memory_bytes(device), comparison, batch, tuple(reasons))


def settings_of(recipe: Recipe, *, device: str, types: NumberTypes) -> Settings:
    """What a rehearsal must know of a recipe without `auto`."""
    lora, targets = recipe.lora, recipe.lora.target_modules
    model = recipe.model
    return Settings(
        method=recipe.method,
        quantization=NF4 if model.quantization == "none" else Quantization(model.quantization, model.double_quant),
        device=device,
        compute=types.compute,
        factors=types.factors,
        r=lora.r,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=lora.use_dora,
        modules_to_save=tuple(lora.modules_to_save),
        optimizer=recipe.train.optimizer,
        checkpointing=recipe.memory.gradient_checkpointing is not False,
        num_threads=torch.get_num_threads(),
    )


def largest_batch(micro_batch_tokens: int, length: int, label_share: float) -> MicroBatch:
    """A micro-batch as full as it may be: of equal examples, each as long as they come or a little shorter."""
    num_examples = -(-micro_batch_tokens // length)
    return MicroBatch(micro_batch_tokens // num_examples, num_examples, label_share)


def _refuse_without_bf16(recipe: Recipe, types: NumberTypes) -> None:
    """fp16 factors have fp32 masters of their own kind; whole weights and new rows have none."""
    asked = {
        "method: full": recipe.method == "full",
        "lora.modules_to_save": bool(recipe.lora.modules_to_save),
        "data.special_tokens": bool(recipe.data.special_tokens),
    }
    for name in (name for name, is_asked in asked.items() if is_asked and types.scale_loss):
        raise ModelError(
            f"{name}: trains weights of the model itself, which fp16 cannot hold exactly enough ({types.reason}). "
            "Use model.dtype: fp32"
        )


def device_memory_bytes(device: str) -> int:
    """All memory of the device: of the card, or of the machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _revision_reason(asked: str | None) -> str:
    return f"which {asked} was when it was fetched" if asked else "the newest that was fetched"


def _choose_quantization(recipe: Recipe, source: Path) -> tuple[dict[str, Any], str]:
    """-> (model.quantization and model.double_quant as they will be, reason)."""
    stored = stored_quantization(read_config(source), source)
    if stored is None and recipe.method == "qlora":
        quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
        return _as_settings(quantization), f"{quantization}: asked for"
    if stored is None:
        return {"quantization": "none"}, f"none: method {recipe.method} has a 16-bit base"
    if recipe.method != "qlora":
        raise ModelError(
            f"{source}: its weights are quantized ({stored}), and method {recipe.method} needs 16 bits. Use method: qlora, or "
            "give the original"
        )
    return _as_settings(stored), f"{stored}: the folder is quantized already and used as it is"


def _as_settings(quantization: Quantization) -> dict[str, Any]:
    return {"quantization": quantization.kind, "double_quant": quantization.double_quant}


def _choose_format(recipe: Recipe) -> tuple[str, str]:
    data = recipe.data
    if not all(Path(path).exists() for path, _ in data.train_files):  # a run may be asked when its data are gone
        return data.format, "the training data are not there"
    chosen, reason = find_format(data.train_files, format=data.format)
    if data.eval is None or not Path(data.eval).exists():
        return chosen, reason
    held_out = format_of_held_out(data.eval, format=chosen)
    return chosen, reason if held_out == chosen else f"{reason}; data.eval is {held_out}"


def choose_length(recipe: Recipe, source: Path, cache: Path, *, limit: int | None) -> tuple[int, str, float]:
    """-> (max_seq_length, reason, share of tokens that carry a label; 1.0 where the rows were not looked at)."""
    asked = recipe.data.max_seq_length
    if asked != "auto":
        if limit is not None and asked > limit:
            raise DataError(
                f"data.max_seq_length: {asked} is more than the model's {limit} positions. Use at most {limit}, or auto"
            )
        return asked, f"{asked}: asked for", 1.0
    examples = load_examples(
        recipe.data.train_files,
        load_tokenizer(source, special_tokens=recipe.data.special_tokens),
        format=recipe.data.format,
        num_rows=recipe.data.num_train,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=None,
        cache_dir=cache / "data",
    )
    length, reason = propose_max_seq_length(examples.lengths, limit=limit, is_text=examples.is_text)
    return length, f"{length}: {reason}", float(examples.num_label_tokens.sum() / examples.lengths.sum())


def choose_micro_batch(asked: int | str, device: str, length: int) -> tuple[int, str]:
    if asked != "auto":
        return int(asked), f"{asked}: asked for"
    tokens = max(MICRO_BATCH_TOKENS[device], length)
    return tokens, f"{tokens}: enough to hide dequantizing the weights; does not change the result"


def _checkpointing_reason(asked: bool | str) -> str:
    if asked == "auto":
        return "on: keeps one hidden state a layer; costs about a third of the speed and saves most activations"
    return f"{'on' if asked else 'off'}: asked for"
