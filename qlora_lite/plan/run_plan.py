"""The plan of a run: a recipe whose base and data are on this machine -> `Plan`, for training, scoring and merging."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_lite.base.source import context_window, find_base, load_config
from qlora_lite.device.accelerator import choose_device, recipe_word
from qlora_lite.device.card import name_of
from qlora_lite.files.cache import default_cache
from qlora_lite.model.dtypes import choose_types, types_of_run
from qlora_lite.plan.budget import budget_of, host_budget_of, measured_here
from qlora_lite.plan.needs import choose_format, needs_of, with_scored
from qlora_lite.plan.planner import homes_of
from qlora_lite.plan.resolve import Base, Place, Resolved, free_of, refuse_wrong_modules, resolve
from qlora_lite.plan.strategy import Free, Strategy, next_leaner
from qlora_lite.recipe import Reason, Recipe
from qlora_lite.recipe.hub_names import commit_of, is_hub_name
from qlora_lite.training.footprint import Footprint


@dataclass(frozen=True)
class Plan(Resolved):
    """The resolved recipe of a run, with its base on this machine."""

    source: Path  # the base's folder
    cache: Path
    leaner: Callable[[Footprint], Footprint | None]  # the next footprint when memory runs out

    def to_json_dict(self) -> dict[str, Any]:
        """Return the content of plan.json."""
        return {
            "model": self.recipe.model.base,
            "card": name_of(self.card),
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "slowdown": self.chosen.slowdown,
            "settings": self.recipe.model_dump(mode="json"),
            "reasons": [str(reason) for reason in self.reasons],
            "sharing": self.sharing and self.sharing.to_json_dict(),
            **self.methods_json(),
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

    With `like`, a recipe resolved earlier, each auto of `recipe` takes its value, except the device, which is this machine's.
    `is_record`: `recipe` is that of a finished run, opened on any machine, and its number types are those of the training.
    `base`: the new folder of a moved `model.base`; its hash is compared when it is loaded. The plan's `fits` says whether it fits.
    Raises UserError subclasses for an unusable model, device or data.
    """
    cache = cache or default_cache()
    # Memory may run out in a resumed run too: then what the recipe itself leaves open may change, not only what is open now.
    may_change, asked = free_of(recipe), "auto" if is_record else recipe.device
    begun_on = like.device if like is not None else recipe.device if is_record else None
    recipe = recipe if like is None else _settled(recipe, like)
    place = _place_of(recipe, cache, device=asked, begun_on=begun_on, is_record=is_record)
    model = _base_of(recipe, cache, moved_to=base)
    if not is_record:
        refuse_wrong_modules(recipe, model.config)
    data_format, format_reason = choose_format(recipe)
    source, window = model.source, context_window(model.config)
    assert source is not None
    needs = needs_of(recipe, source, cache, limit=window)
    needs = with_scored(recipe, needs, source, cache, window=window, is_looked_at=not is_record)
    asked_revision = recipe.model.revision
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": data_format})})
    resolved = resolve(recipe, model, place, needs, free_of(recipe))
    reasons = [
        *([Reason("model.revision", model.commit, _revision_reason(asked_revision))] if model.commit else []),
        Reason("data.format", data_format, format_reason),
        *resolved.reasons,
    ]
    values = {name: getattr(resolved, name) for name in Resolved.__dataclass_fields__} | {"reasons": tuple(reasons)}
    return Plan(**values, source=source, cache=cache, leaner=_leaner(may_change, resolved))


def _leaner(free: Free, resolved: Resolved) -> Callable[[Footprint], Footprint | None]:
    settings, length = resolved.chosen.settings, resolved.chosen.length

    def homes() -> Sequence[Strategy]:
        has_host = bool(resolved.host_budget_bytes)
        return homes_of(resolved.rehearsals, settings, free, length, has_host=has_host)

    return next_leaner(free, length=length, homes=cache(homes))


def _place_of(recipe: Recipe, cache: Path, *, device: str, begun_on: str | None, is_record: bool) -> Place:
    card, why = choose_device(device)
    begun_on = begun_on or recipe_word(card)
    if begun_on != recipe_word(card):
        why += f"; the run began on {begun_on}"
    types = types_of_run(recipe.model.dtype) if is_record else choose_types(recipe.model.dtype, card)
    measured = measured_here(card, cache=cache)
    reason = Reason("device", recipe_word(card), why)
    budget = budget_of(recipe.memory.budget, card, measured=measured)
    host_budget = host_budget_of(recipe.memory.host_budget, card)
    return Place(card, reason, types, *budget, measured, begun_on, *host_budget)


def _base_of(recipe: Recipe, cache: Path, *, moved_to: Path | None) -> Base:
    if moved_to is not None:
        source = find_base(str(moved_to.absolute()), cache=cache)
        return Base(load_config(source), source, recipe.model.revision)
    source = find_base(recipe.model.base, cache=cache, revision=recipe.model.revision)
    return Base(load_config(source), source, commit_of(source) if is_hub_name(recipe.model.base) else None)


def _settled(recipe: Recipe, like: Recipe) -> Recipe:
    """Return `recipe` with the values of `like` in place of each auto."""

    def settled(value: Any, earlier: Any) -> Any:
        if not isinstance(value, BaseModel):
            return earlier if value == "auto" else value
        return value.model_copy(
            update={name: settled(getattr(value, name), getattr(earlier, name)) for name in type(value).model_fields}
        )

    merged: Recipe = settled(recipe, like)
    return merged


def _revision_reason(asked: str | None) -> str:
    return f"the commit of {asked} when it was fetched" if asked else "the newest fetched commit"
