"""Resolve a recipe: recipe, base and device -> a value and a reason for every `auto` except the memory budget's.

`plan`, `train` and the Python interface all call `resolve`; they differ in how they find base, device and data: run_plan.py for a run,
request.py for a name, a folder or a card that is not present.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from qlora_lite.base.quantization import Quantization, stored_quantization
from qlora_lite.base.source import context_window, read_config
from qlora_lite.data.trees import Sharing
from qlora_lite.device.accelerator import recipe_word
from qlora_lite.device.card import Card
from qlora_lite.errors import DoesNotFit, ModelError
from qlora_lite.evaluation.generate import BATCH_TOKENS
from qlora_lite.model.adapter import modules_trained_whole
from qlora_lite.model.dtypes import NumberTypes
from qlora_lite.model.load import load_tokenizer
from qlora_lite.model.meta import meta_model
from qlora_lite.model.policy import Policy
from qlora_lite.plan.compare import METHODS, Comparison, Rehearsals, as_json, own_method
from qlora_lite.plan.fits import Room
from qlora_lite.plan.homes import Budgets
from qlora_lite.plan.merging import Merging
from qlora_lite.plan.needs import Needs, choose_sharing
from qlora_lite.plan.planner import Concession, Fit, concessions, fit, leanest_settings, shortage
from qlora_lite.plan.rehearsal import NF4, MicroBatch, Rehearsal, Settings
from qlora_lite.plan.strategy import OPTIMIZERS, Free
from qlora_lite.recipe import Reason, Recipe
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Base:
    """The base model of a recipe: its config, and its folder if it exists."""

    config: PreTrainedConfig
    source: Path | None  # 16-bit or quantized model folder; None for a shape of the built-in table
    commit: str | None = None  # of a hub model


@dataclass(frozen=True)
class Place:
    """The device of training, its number types and its budget, with a reason for each."""

    card: Card
    card_reason: Reason
    types: NumberTypes
    budget_bytes: int
    budget_reason: str  # why the budget is this one
    measured: Mapping[str, Any]  # by doctor on this card
    begun_on: str | None = None  # the recipe's `device` where a resumed run began
    host_budget_bytes: int = 0
    host_budget_reason: str = ""


@dataclass(frozen=True)
class Resolved:
    """A recipe without any `auto` except the memory budget's, and the memory it needs."""

    recipe: Recipe
    card: Card  # the computing device; `recipe.device` is where a resumed run began
    types: NumberTypes
    budget_bytes: int
    host_budget_bytes: int
    rehearsals: Rehearsals  # computed on demand
    chosen: Fit
    free: Free  # the recipe's settings, None for those left to the planner
    label_share: float  # of all tokens
    reasons: tuple[Reason, ...]  # one per choice
    sharing: Sharing | None  # shared prefixes; None if every example is computed separately

    @property
    def device(self) -> str:
        """torch's device type of the tensors."""
        return self.card.device

    @property
    def share_prefixes(self) -> bool:
        """Whether examples are packed as prefix trees."""
        return self.recipe.data.share_prefixes is True

    @property
    def batch(self) -> MicroBatch:
        """The largest possible micro-batch."""
        return self.chosen.batch

    @property
    def method(self) -> str:
        """The one of METHODS that runs."""
        return own_method(self.recipe.method, self.chosen.settings.optimizer)

    @property
    def peak_bytes(self) -> int:
        """The peak of the recipe's method, on the device."""
        return self.rehearsal(self.method).peak_bytes

    @property
    def fits(self) -> bool:
        own = self.rehearsal(self.method)
        return self.budgets.fit(own)

    @cached_property
    def concessions(self) -> tuple[Concession, ...]:
        """Settings that would save memory; empty if the plan fits."""
        return () if self.fits else concessions(self.rehearsals, self.chosen.settings, self.batch, self.chosen.scoring)

    def refuse_what_does_not_fit(self) -> None:
        """Raise DoesNotFit, with settings to try, if the plan needs more than the budget."""
        if not self.fits:
            own = self.rehearsal(self.method)
            raise DoesNotFit(shortage(own, self.concessions, self.budgets))

    @property
    def budgets(self) -> Budgets:
        return Budgets(self.budget_bytes, self.host_budget_bytes, self.card.is_cpu)

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.rehearsals, self.chosen.settings)

    def rehearsal(self, method: str) -> Rehearsal:
        """Rehearse one of METHODS with these settings and the largest micro-batch; the run's own method with its evaluation."""
        scoring = self.chosen.scoring if method == self.method else None
        return self.comparison.rehearse(method, self.batch, scoring)

    @property
    def leanest(self) -> Settings:
        """The settings for the longest sequences."""
        return leanest_settings(self.chosen.settings, self.free)

    @property
    def room(self) -> Room:
        return Room(self.budget_bytes, context_window(self.rehearsals.config), self.label_share)

    @property
    def merging(self) -> Merging | None:
        """The settings of the merge; None if every weight is trained."""
        settings, merge = self.chosen.settings, self.recipe.merge
        if settings.method == "full":
            return None
        of_base = settings if merge.base == "dequantized" else replace(settings, method="lora")
        return Merging(of_base, dtype=merge.dtype, rounding=merge.rounding)

    @property
    def quantization(self) -> Quantization | None:
        """The quantization of the frozen weights; None for 16 bits."""
        model = self.recipe.model
        return None if model.quantization == "none" else Quantization(model.quantization, model.double_quant)

    def methods_json(self) -> dict[str, Any]:
        """Return the part of the JSON document that compares methods."""
        full = self.rehearsal("full").peak_bytes
        return {
            "methods": {method: as_json(self.rehearsal(method)) for method in METHODS},
            "savings_vs_full": {"bytes": full - self.peak_bytes, "percent": 100 * (1 - self.peak_bytes / full)},
        }


def resolve(recipe: Recipe, base: Base, place: Place, needs: Needs, free: Free) -> Resolved:
    """Choose a value for every `auto` of `recipe`, within the place's budget. `free` has the planner's freedom: see `free_of`.

    `recipe.data.format` is already chosen if data exist. The result's `fits` says whether it fits. Raises ModelError.
    """
    quantization, quantization_reason = _choose_quantization(recipe, base.source)
    refuse_without_bf16(recipe, place.types)
    needs, sharing_reason = choose_sharing(recipe, needs, base.config)
    model = {"revision": base.commit, "dtype": place.types.name, "attention": "sdpa"}
    values = recipe.model_copy(
        update={
            "device": place.begun_on or recipe_word(place.card),
            "model": recipe.model.model_copy(update={**model, **quantization}),
            "data": recipe.data.model_copy(update={"share_prefixes": needs.sharing is not None}),
        }
    )
    rehearsals = Rehearsals(base.config)
    chosen = fit(
        rehearsals,
        settings_of(values, place, token_ids=_token_ids(recipe, base)),
        free,
        needs,
        Budgets(place.budget_bytes, place.host_budget_bytes, place.card.is_cpu),
    )
    packed = "each branch attends to its prefix and itself" if needs.sharing else "each example attends to itself"
    reasons = [
        *recipe.notes,
        place.card_reason,
        Reason("model.dtype", place.types.name, place.types.reason),
        quantization_reason,
        Reason("model.attention", "sdpa", f"{packed} in a packed sequence"),
        sharing_reason,
        Reason("memory.budget", format_bytes(place.budget_bytes), f"{place.budget_reason}{chosen.slowdown_in_words}"),
        Reason("memory.host_budget", format_bytes(place.host_budget_bytes), place.host_budget_reason),
        *chosen.reasons,
    ]
    if place.card.is_cpu and chosen.settings.optimizer.startswith("paged"):
        why = "pages on CUDA only; on the CPU its state is never paged"
        reasons.append(Reason("train.optimizer", chosen.settings.optimizer, why))
    return Resolved(
        recipe=_with_choices(values, chosen),
        card=place.card,
        types=place.types,
        budget_bytes=place.budget_bytes,
        host_budget_bytes=place.host_budget_bytes,
        rehearsals=rehearsals,
        chosen=chosen,
        free=free,
        label_share=needs.label_share,
        reasons=tuple(reasons),
        sharing=needs.sharing,
    )


_HOMES = tuple(field.name for field in fields(Policy))  # keys of the recipe's section `memory`


def free_of(recipe: Recipe) -> Free:
    """Return `recipe`'s settings of the planner, with None for each auto."""
    memory, train = recipe.memory, recipe.train
    checkpointing, tokens, chunk = memory.gradient_checkpointing, train.micro_batch_tokens, memory.head_chunk
    return Free(
        checkpoint_every=None if checkpointing == "auto" else int(checkpointing),
        micro_batch_tokens=None if tokens == "auto" else tokens,
        head_chunk=None if chunk == "auto" else chunk,
        optimizer=None if train.optimizer == "auto" else train.optimizer,
        eval_batch_tokens=None if memory.eval_batch_tokens == "auto" else memory.eval_batch_tokens,
        policy=tuple((key, _to_policy(getattr(memory, key))) for key in _HOMES if getattr(memory, key) != "auto"),
    )


def _to_policy(value: Any) -> Any:
    return None if value == "all" else value


def _to_recipe(value: Any) -> Any:
    return "all" if value is None else value


def _with_choices(recipe: Recipe, chosen: Fit) -> Recipe:
    """Return `recipe` with the planner's choices in place of each auto."""
    footprint, every = chosen.footprint, chosen.footprint.checkpoint_every
    asked = recipe.memory.eval_batch_tokens
    fitting = BATCH_TOKENS if chosen.scoring is None else chosen.scoring.batch_tokens
    memory = {
        "gradient_checkpointing": every if every > 1 else bool(every),
        "head_chunk": footprint.head_chunk,
        "eval_batch_tokens": fitting if asked == "auto" else asked,
        **{key: _to_recipe(getattr(footprint.policy, key)) for key in _HOMES},
    }
    train = {"micro_batch_tokens": footprint.micro_batch_tokens, "optimizer": chosen.settings.optimizer}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"max_seq_length": chosen.length}),
            "eval": recipe.eval.model_copy(update={"max_seq_length": chosen.score_limit}),
            "train": recipe.train.model_copy(update=train),
            "memory": recipe.memory.model_copy(update=memory),
        }
    )


def settings_of(recipe: Recipe, place: Place, *, token_ids: tuple[int, ...] = ()) -> Settings:
    """Return the settings of a rehearsal that recipe and device determine; `fit` chooses the rest. `token_ids`: see `_token_ids`."""
    workspace = place.measured.get("cublas_workspace_bytes")  # of one of two handles: the main thread's and autograd's
    lora, targets = recipe.lora, recipe.lora.target_modules
    model = recipe.model
    return Settings(
        method=recipe.method,
        quantization=NF4 if model.quantization == "none" else Quantization(model.quantization, model.double_quant),
        card=place.card,
        compute=place.types.compute,
        factors=place.types.factors,
        r=lora.r,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        modules_to_save=tuple(lora.modules_to_save),
        token_ids=token_ids,
        optimizer=OPTIMIZERS[-1] if recipe.train.optimizer == "auto" else recipe.train.optimizer,
        num_threads=torch.get_num_threads(),
        runtime_bytes=2 * workspace if isinstance(workspace, int) else None,
    )


def _token_ids(recipe: Recipe, base: Base) -> tuple[int, ...]:
    """Return the ids of data.special_tokens, as in training; without a tokenizer, the ids after the vocabulary. Raises ModelError."""
    tokens = recipe.data.special_tokens
    if not tokens:
        return ()
    if base.source is None:
        return tuple(base.config.vocab_size + i for i in range(len(tokens)))
    tokenizer = load_tokenizer(base.source, special_tokens=tokens)
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def refuse_wrong_modules(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise ModelError for names in lora.target_modules and lora.modules_to_save that the model lacks, like training."""
    lora, targets = recipe.lora, recipe.lora.target_modules
    if recipe.method == "full" or (isinstance(targets, str) and not lora.modules_to_save):
        return
    model = meta_model(copy.deepcopy(config), quantization=NF4 if recipe.method == "qlora" else None)
    modules_trained_whole(
        model,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=lora.modules_to_save,
        has_new_tokens=bool(recipe.data.special_tokens),
    )


def refuse_without_bf16(recipe: Recipe, types: NumberTypes) -> None:
    """Raise ModelError if the model's own weights would be trained in fp16: unlike factors, they have no fp32 master there."""
    trained = {
        "method: full": recipe.method == "full",
        "lora.modules_to_save": bool(recipe.lora.modules_to_save),
        "data.special_tokens": bool(recipe.data.special_tokens),
    }
    for name in (name for name, is_trained in trained.items() if is_trained and types.scale_loss):
        raise ModelError(
            f"{name}: trains weights of the base model, and fp16 is not precise enough for them ({types.name}: {types.reason}). "
            "Use model.dtype: fp32"
        )


def _choose_quantization(recipe: Recipe, source: Path | None) -> tuple[dict[str, Any], Reason]:
    """-> (values of model.quantization and model.double_quant, reason). Raises ModelError."""
    key, stored = "model.quantization", None if source is None else stored_quantization(read_config(source), source)
    if stored is None and recipe.method == "qlora":
        quantization = Quantization(recipe.model.quantization, recipe.model.double_quant)
        return _as_settings(quantization), Reason(key, str(quantization), "asked for")
    if stored is None:
        return {"quantization": "none"}, Reason(key, "none", f"method {recipe.method} uses a 16-bit base")
    if recipe.method != "qlora":
        raise ModelError(
            f"{source}: its weights are quantized ({stored}), but method {recipe.method} needs 16-bit weights. Use method: qlora, "
            "or the 16-bit original"
        )
    return _as_settings(stored), Reason(key, str(stored), "the folder is already quantized and used unchanged")


def _as_settings(quantization: Quantization) -> dict[str, Any]:
    return {"quantization": quantization.kind, "double_quant": quantization.double_quant}
