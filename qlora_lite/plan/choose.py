"""Turn every `auto` of a recipe into a value, out loud: each choice comes with its reason."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedConfig

from qlora_lite.base.generation_settings import base_stops
from qlora_lite.base.quantization import Quantization, stored_quantization
from qlora_lite.base.shipped import default_cache
from qlora_lite.base.skeleton import model_class
from qlora_lite.base.source import context_window, find_base, load_config, read_config
from qlora_lite.data.batches import sampler_of
from qlora_lite.data.examples import Examples, load_examples
from qlora_lite.data.inspect import propose_max_seq_length
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.data.template import Vocabulary
from qlora_lite.data.trees import Sharing, sharing
from qlora_lite.device.accelerator import choose_device, recipe_word
from qlora_lite.device.card import Card, name_of
from qlora_lite.errors import DataError, DoesNotFit, ModelError
from qlora_lite.evaluation.generate import BATCH_TOKENS
from qlora_lite.evaluation.held_out import held_out_rows, longest_scored
from qlora_lite.model.adapter import modules_trained_whole
from qlora_lite.model.attention import why_not_shared
from qlora_lite.model.dtypes import NumberTypes, choose_types, types_of_run
from qlora_lite.model.load import load_tokenizer
from qlora_lite.model.meta import meta_model
from qlora_lite.plan.budget import budget_of, measured_here
from qlora_lite.plan.compare import METHODS, Comparison, Rehearsals, as_json, own_method
from qlora_lite.plan.planner import Concession, Fit, Needs, concessions, fit, shortage
from qlora_lite.plan.rehearsal import NF4, MicroBatch, Rehearsal, Settings
from qlora_lite.plan.strategy import OPTIMIZERS, Free, next_leaner
from qlora_lite.recipe import Recipe
from qlora_lite.recipe.hub_names import commit_of, is_hub_name
from qlora_lite.training.footprint import Footprint

SAMPLED_STEPS = 64  # whose rows tell what sharing saves
SIZED_STEPS = 4096  # after these, whose rows are counted only
LEAST_FACTOR = 1.05  # times as many tokens, below which rows are packed one by one


@dataclass(frozen=True)
class Plan:
    """What will be run. `recipe` has no `auto` but the memory budget, which the device answers anew each time."""

    recipe: Recipe
    source: Path  # 16-bit model folder
    cache: Path
    card: Card  # the device that computes here; `recipe.device` says where a run that goes on was begun
    types: NumberTypes
    budget_bytes: int
    rehearsals: Rehearsals  # rehearse when they are asked
    chosen: Fit
    leaner: Callable[[Footprint], Footprint | None]  # for a run that has no memory left
    reasons: tuple[str, ...]
    sharing: Sharing | None = None  # what the data share; None where every row is computed by itself

    @property
    def device(self) -> str:
        """torch's word for where tensors lie."""
        return self.card.device

    @property
    def shares(self) -> bool:
        """Whether rows are packed as prefix trees."""
        return self.recipe.data.share_prefixes is True

    @property
    def batch(self) -> MicroBatch:
        """The largest there may be."""
        return self.chosen.batch

    @property
    def method(self) -> str:
        """Which of METHODS is run."""
        return own_method(self.recipe.method, self.recipe.train.optimizer)

    @property
    def peak_bytes(self) -> int:
        """What the recipe's own method will need on the device."""
        return self.rehearsal(self.method).peak_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @cached_property
    def concessions(self) -> tuple[Concession, ...]:
        """What further settings would save; empty where it fits."""
        return () if self.fits else concessions(self.rehearsals, self.chosen.settings, self.batch, self.chosen.scoring)

    def refuse_what_does_not_fit(self) -> None:
        """Raise DoesNotFit, with what would help, for a plan that needs more than its budget."""
        if not self.fits:
            own = self.rehearsal(self.method)
            raise DoesNotFit(shortage(own, self.concessions, budget_bytes=self.budget_bytes))

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.rehearsals, self.chosen.settings)

    def rehearsal(self, method: str) -> Rehearsal:
        """Of one of METHODS, with this plan's settings and largest micro-batch; the run's own with its evaluation."""
        scoring = self.chosen.scoring if method == self.method else None
        return self.comparison.rehearse(method, self.batch, scoring)

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
            "card": name_of(self.card),
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "slowdown": self.chosen.slowdown,
            "settings": self.recipe.model_dump(mode="json"),
            "reasons": list(self.reasons),
            "sharing": self.sharing and self.sharing.to_json_dict(),
            "methods": {method: as_json(self.rehearsal(method)) for method in METHODS},
            "savings_vs_full": {"bytes": full - self.peak_bytes, "percent": 100 * (1 - self.peak_bytes / full)},
            "max_seq_length": self.recipe.data.max_seq_length,
            "checkpoint_bytes": self.comparison.checkpoint_bytes(self.batch),
        }


def make_plan(
    recipe: Recipe,
    *,
    cache: Path | None = None,
    like: Recipe | None = None,
    is_record: bool = False,
    base: Path | None = None,
) -> Plan:
    """Resolve `recipe` for this machine. Reads config, tokenizer and data, no weights (a GGUF is converted on first use).

    With `like`, a recipe that was resolved before, everything that `recipe` leaves to auto is as it was then, but for the device, which
    is that of this machine. `is_record`: `recipe` is that of a finished run, opened on any machine: it says what was trained, and with
    which types; we compute on what is here. `base`: where the model of `model.base` lies now, for one that was moved; whether it is the
    same is asked when it is loaded. Whether it fits is the
    plan's own word (`fits`). Raises UserError subclasses for a model, a device or data that cannot be used.
    """
    cache = cache or default_cache()
    card, device_reason = choose_device("auto" if is_record else recipe.device)
    may_change, recipe = free_of(recipe), recipe if like is None else _settled(recipe, like)
    begun_on = recipe.device if is_record else recipe_word(card) if like is None else like.device
    if begun_on != recipe_word(card):
        device_reason += f"; the run was begun on {begun_on}"
    types = types_of_run(recipe.model.dtype) if is_record else choose_types(recipe.model.dtype, card)
    if base is None:
        source = find_base(recipe.model.base, cache=cache, revision=recipe.model.revision)
        commit = commit_of(source) if is_hub_name(recipe.model.base) else None
    else:
        source, commit = find_base(str(base.absolute()), cache=cache), recipe.model.revision
    config = load_config(source)
    if not is_record:
        refuse_wrong_modules(recipe, config)
    quantization, quantization_reason = _choose_quantization(recipe, source)
    data_format, format_reason = _choose_format(recipe)
    needs = needs_of(recipe, source, cache, limit=context_window(config))
    needs = with_scored(recipe, needs, source, cache, window=context_window(config), is_looked_at=not is_record)
    needs, sharing_reason = choose_sharing(recipe, needs, config)
    refuse_without_bf16(recipe, types)
    resolved = recipe.model_copy(
        update={
            "device": begun_on,
            "model": recipe.model.model_copy(
                update={"revision": commit, "dtype": types.name, "attention": "sdpa", **quantization}
            ),
            "data": recipe.data.model_copy(update={"format": data_format, "share_prefixes": needs.sharing is not None}),
        }
    )
    measured = measured_here(card, cache=cache)
    budget, budget_reason = budget_of(recipe.memory.budget, card, measured=measured)
    rehearsals, settings = Rehearsals(config), settings_of(resolved, card=card, types=types, measured=measured)
    chosen = fit(rehearsals, settings, free_of(recipe), needs, budget_bytes=budget)
    reasons = [
        *recipe.notes,
        *([f"model.revision: {commit}, {_revision_reason(recipe.model.revision)}"] if commit else []),
        f"device: {device_reason}",
        f"model.dtype: {types.reason}",
        f"model.quantization: {quantization_reason}",
        f"model.attention: sdpa, {'each branch over its passage and itself' if needs.sharing else 'example by example'} on packed rows",
        f"data.format: {data_format}: {format_reason}",
        f"data.share_prefixes: {sharing_reason}",
        f"memory.budget: {budget_reason}{chosen.slowdown_in_words}",
        *(f"{key}: {reason}" for key, reason in chosen.reasons.items()),
    ]
    if card.is_cpu and chosen.settings.optimizer.startswith("paged"):
        reasons.append(
            f"train.optimizer: {chosen.settings.optimizer} pages on CUDA only; on the CPU its state stays where it is"
        )
    return Plan(
        recipe=with_choices(resolved, chosen),
        source=source,
        cache=cache,
        card=card,
        types=types,
        budget_bytes=budget,
        rehearsals=rehearsals,
        chosen=chosen,
        leaner=next_leaner(may_change, length=chosen.length),
        reasons=tuple(reasons),
        sharing=needs.sharing,
    )


def free_of(recipe: Recipe) -> Free:
    """What `recipe` leaves to the planner."""
    memory, train = recipe.memory, recipe.train
    checkpointing, tokens, chunk = memory.gradient_checkpointing, train.micro_batch_tokens, memory.head_chunk
    return Free(
        checkpoint_every=None if checkpointing == "auto" else int(checkpointing),
        micro_batch_tokens=None if tokens == "auto" else tokens,
        head_chunk=None if chunk == "auto" else chunk,
        optimizer=None if train.optimizer == "auto" else train.optimizer,
        eval_batch_tokens=None if memory.eval_batch_tokens == "auto" else memory.eval_batch_tokens,
    )


def with_choices(recipe: Recipe, chosen: Fit) -> Recipe:
    """`recipe` with the planner's choices in place of its autos."""
    footprint, every = chosen.footprint, chosen.footprint.checkpoint_every
    asked = recipe.memory.eval_batch_tokens
    fitting = BATCH_TOKENS if chosen.scoring is None else chosen.scoring.batch_tokens
    memory = {
        "gradient_checkpointing": every if every > 1 else bool(every),
        "head_chunk": footprint.head_chunk,
        "eval_batch_tokens": fitting if asked == "auto" else asked,
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


def _settled(recipe: Recipe, like: Recipe) -> Recipe:
    """`recipe` with every auto as `like` has it."""

    def settled(mine: Any, theirs: Any) -> Any:
        if not isinstance(mine, BaseModel):
            return theirs if mine == "auto" else mine
        return mine.model_copy(
            update={name: settled(getattr(mine, name), getattr(theirs, name)) for name in type(mine).model_fields}
        )

    merged: Recipe = settled(recipe, like)
    return merged


def settings_of(recipe: Recipe, *, card: Card, types: NumberTypes, measured: Mapping[str, Any]) -> Settings:
    """What a rehearsal must know of a recipe and, `measured`, of this machine's card; `fit` says the rest."""
    workspace = measured.get(
        "cublas_workspace_bytes"
    )  # of one handle: the program's thread and autograd's have one each
    lora, targets = recipe.lora, recipe.lora.target_modules
    model = recipe.model
    return Settings(
        method=recipe.method,
        quantization=NF4 if model.quantization == "none" else Quantization(model.quantization, model.double_quant),
        card=card,
        compute=types.compute,
        factors=types.factors,
        r=lora.r,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=lora.use_dora,
        modules_to_save=tuple(lora.modules_to_save),
        optimizer=OPTIMIZERS[-1] if recipe.train.optimizer == "auto" else recipe.train.optimizer,
        num_threads=torch.get_num_threads(),
        runtime_bytes=2 * workspace if isinstance(workspace, int) else None,
    )


def refuse_wrong_modules(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise ModelError for names in lora.target_modules and lora.modules_to_save that the model has not, as training would."""
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


def needs_of(recipe: Recipe, source: Path, cache: Path, *, limit: int | None) -> Needs:
    """What the training rows ask for. With a given length they are read only if they are there and may share. Raises DataError."""
    asked = recipe.data.max_seq_length
    needs = Needs(0, "asked for", 1.0, num_scored=num_scored(recipe), max_new_tokens=recipe.eval.max_new_tokens)
    if asked != "auto" and limit is not None and asked > limit:
        raise DataError(
            f"data.max_seq_length: {asked} is more than the model's {limit} positions. Use at most {limit}, or auto"
        )
    may_share = _may_share(recipe, load_config(source), 0 if asked == "auto" else asked)
    if asked != "auto" and not (may_share and _are_there(recipe)):
        return replace(needs, length=asked)
    examples = load_examples(
        recipe.data.train_files,
        load_tokenizer(source, special_tokens=recipe.data.special_tokens),
        format=recipe.data.format,
        num_rows=recipe.data.num_train,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=None if asked == "auto" else asked,
        cache_dir=cache / "data",
        vocabulary=Vocabulary.of(load_config(source), recipe.data.special_tokens, base_stops(source)),
    )
    found = _sharing_of(recipe, examples) if may_share else None
    if asked != "auto":
        return replace(needs, length=asked, sharing=found)
    length, reason = propose_max_seq_length(examples.lengths, limit=limit, is_text=examples.is_text)
    label_share = float(examples.num_label_tokens.sum() / examples.lengths.sum())
    return replace(
        needs,
        length=length,
        reason=reason,
        label_share=label_share,
        is_free=True,
        lengths=examples.lengths,
        sharing=found,
    )


def with_scored(
    recipe: Recipe, needs: Needs, source: Path, cache: Path, *, window: int | None, is_looked_at: bool
) -> Needs:
    """`needs`, and how long held-out rows may be and are: scoring takes longer ones than training. Raises DataError."""
    data = recipe.data
    limit, reason = longest_scored(recipe.eval.max_seq_length, window=window, trained_length=needs.length)
    is_free = recipe.eval.max_seq_length == "auto"
    known = None if is_free and window is None else limit
    needs = replace(needs, score_limit=known, score_reason=reason, score_is_free=is_free)
    if not is_looked_at or known is None or data.eval is None or not Path(data.eval).exists():
        return needs
    rows = held_out_rows(
        data.eval,
        load_tokenizer(source, special_tokens=data.special_tokens),
        format=data.format,
        num_rows=recipe.eval.num_examples,
        no_answer_text=data.no_answer_text,
        max_seq_length=limit,
        text_length=needs.length,
        window=window,
        cache_dir=cache / "data",
    )
    longest, share = int(rows.lengths.max()), float(rows.num_label_tokens.sum() / rows.lengths.sum())
    return replace(needs, longest_scored=longest, scored_label_share=share)


def _may_share(recipe: Recipe, config: PreTrainedConfig, length: int) -> bool:
    return (
        recipe.data.share_prefixes is not False and why_not_shared(model_class(config), config, length=length) is None
    )


def _are_there(recipe: Recipe) -> bool:
    """The data; a run may be asked when they are gone."""
    return all(Path(path).exists() for path, _ in recipe.data.train_files)


def _sharing_of(recipe: Recipe, examples: Examples) -> Sharing:
    """Of the steps that training begins with. Those that come later, in another order, may be fuller: of them the sizes count too."""
    train = recipe.train
    steps_per_epoch = math.ceil(len(examples.lengths) / train.examples_per_step)
    num_steps = train.max_steps or math.ceil((train.epochs or 1.0) * steps_per_epoch)
    sampler = sampler_of(
        examples,
        examples_per_step=train.examples_per_step,
        epochs=1.0,
        max_steps=max(num_steps, steps_per_epoch),
        seed=train.seed,
        share=True,
    )
    num_sampled = min(steps_per_epoch, SAMPLED_STEPS)
    others = range(num_sampled, max(num_sampled, min(num_steps, num_sampled + SIZED_STEPS)))
    return sharing(examples, map(sampler.rows_of_step, range(num_sampled)), others=map(sampler.rows_of_step, others))


def what_is_shared(recipe: Recipe, source: Path) -> tuple[Sharing | None, str]:
    """-> (what packing the training rows as trees saves, None where it is off; why). Raises DataError."""
    config = load_config(source)
    needs = needs_of(recipe, source, default_cache(), limit=context_window(config))
    needs, reason = choose_sharing(recipe, needs, config)
    return needs.sharing, reason


def choose_sharing(recipe: Recipe, needs: Needs, config: PreTrainedConfig) -> tuple[Needs, str]:
    """-> (needs, without sharing where it is off; reason)."""
    asked, found = recipe.data.share_prefixes, needs.sharing
    if asked is False:
        return replace(needs, sharing=None), "off: asked for"
    why_not = why_not_shared(model_class(config), config, length=needs.length)
    if why_not is not None:
        return replace(needs, sharing=None), f"off: {why_not}, so every row is computed by itself"
    if found is None:
        return needs, "off: the training data are not there"
    saved = f"{found.num_alone:,} tokens of the first steps become {found.num_packed:,}, {found.factor:.2f} times fewer"
    if asked == "auto" and found.factor < LEAST_FACTOR:
        return replace(needs, sharing=None), f"off: rows begin with too little in common; {saved}"
    return needs, f"on: what rows of a step begin with in common is computed once; {saved}"


def num_scored(recipe: Recipe) -> int:
    """Held-out rows at most; of a whole file as many as fill any batch."""
    return 0 if recipe.data.eval is None else recipe.eval.num_examples or BATCH_TOKENS
