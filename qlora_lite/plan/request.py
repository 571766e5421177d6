"""What to plan, from what people ask: a model's name, a model folder, or a recipe. A config is enough; nothing is loaded or fetched.

In: `llama-3.1-8b`, `meta-llama/Llama-3.1-8B`, a folder, or a recipe's path or name. Out: `Request`, with a reason for every guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from qlora_lite.base.known import KNOWN, known_config, known_name, known_shape
from qlora_lite.base.shipped import default_cache
from qlora_lite.base.source import context_window, find_base, load_config
from qlora_lite.data.trees import Sharing
from qlora_lite.device.accelerator import card_here, choose_device
from qlora_lite.device.card import COMMON_CARD, Card
from qlora_lite.errors import ModelError, UserError
from qlora_lite.model.dtypes import choose_types
from qlora_lite.plan.budget import budget_of, measured_here
from qlora_lite.plan.choose import (
    choose_sharing,
    free_of,
    needs_of,
    num_scored,
    refuse_without_bf16,
    refuse_wrong_modules,
    settings_of,
    with_choices,
    with_scored,
)
from qlora_lite.plan.compare import Rehearsals, own_method
from qlora_lite.plan.fits import Room
from qlora_lite.plan.merging import Merging
from qlora_lite.plan.planner import Fit, Needs, fit, leanest_settings
from qlora_lite.plan.rehearsal import Settings
from qlora_lite.recipe import DEFAULT_RECIPE, Recipe, list_recipes, load_recipe
from qlora_lite.recipe.hub_names import fetch_command, find_fetched, is_hub_name
from qlora_lite.units import format_bytes

_ASSUMED_LENGTH, _ASSUMED_LABEL_SHARE = 1024, 0.1


@dataclass(frozen=True)
class Request:
    """All that a forecast takes, and why."""

    model: str
    card: Card
    rehearsals: Rehearsals
    chosen: Fit
    leanest: Settings  # what the longest sequences are trained with
    room: Room
    method: str
    merging: Merging | None  # None where there is nothing to merge
    recipe: dict[str, Any]  # the settings as a recipe has them, chosen ones included
    reasons: tuple[str, ...]
    sharing: Sharing | None  # what the data share; None where every row is computed by itself


def read_request(
    what: str, *, overrides: Sequence[str] = (), budget_bytes: int | None = None, named: Card | None = None
) -> Request:
    """`named` is a card to plan for that need not be here. Raises RecipeError for a recipe, UserError for anything that is not known."""
    is_model = _is_model(what)
    if (
        not is_model
        and not Path(what).exists()
        and not what.endswith((".yaml", ".yml"))
        and what not in _recipe_names()
    ):
        _refuse_unknown(what)
    if is_model:  # the default recipe is for a small model, and so is its budget
        overrides = ["memory.budget=auto", *overrides]
    recipe = load_recipe(DEFAULT_RECIPE if is_model else what, overrides=overrides, files_must_exist=False)
    if is_model:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": what})})
    config, source, config_reason = _find_config(recipe)
    refuse_wrong_modules(recipe, config)
    card, device_reason = _choose_card(recipe, named, is_for_a_card=is_model or budget_bytes is not None)
    measured = measured_here(card, cache=default_cache())
    is_set = any(override.startswith("memory.budget=") for override in overrides)
    is_for_another = named is not None and not is_set and budget_bytes is None and recipe.memory.budget != "auto"
    asked = "auto" if is_for_another else recipe.memory.budget
    budget, budget_reason = budget_of(asked if budget_bytes is None else budget_bytes, card, measured=measured)
    if is_for_another:
        assert isinstance(recipe.memory.budget, int)
        budget_reason += f"; the recipe's own {format_bytes(recipe.memory.budget)} is left aside for --card"
    types = choose_types(recipe.model.dtype, card)
    refuse_without_bf16(recipe, types)
    positions = context_window(config)
    needs = _with_scored(
        recipe, _needs(recipe, source, positions, has_data=not is_model), source, positions, has_data=not is_model
    )
    needs, sharing_reason = choose_sharing(recipe, needs, config)
    rehearsals, free = Rehearsals(config), free_of(recipe)
    settings = settings_of(recipe, card=card, types=types, measured=measured)
    chosen = fit(rehearsals, settings, free, needs, budget_bytes=budget)
    resolved = with_choices(recipe, chosen)
    return Request(
        model=what,
        card=card,
        rehearsals=rehearsals,
        chosen=chosen,
        leanest=leanest_settings(chosen.settings, free),
        room=Room(budget, positions, needs.label_share),
        method=own_method(recipe.method, chosen.settings.optimizer),
        merging=_merging(resolved, chosen.settings),
        recipe=resolved.model_dump(mode="json"),
        reasons=(
            *([f"settings: those of {DEFAULT_RECIPE}"] if is_model else []),
            f"model: {config_reason}",
            f"device: {device_reason}",
            f"memory.budget: {budget_reason}{chosen.slowdown_in_words}",
            f"model.dtype: {types.reason}",
            *([] if is_model else [f"data.share_prefixes: {sharing_reason}"]),
            *(f"{key}: {reason}" for key, reason in chosen.reasons.items()),
        ),
        sharing=needs.sharing,
    )


def _is_model(what: str) -> bool:
    """A known shape, a model folder or file, or a name of the hub that was fetched."""
    path = Path(what)
    if known_name(what) is not None or (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
        return True
    return is_hub_name(what) and not path.exists() and find_fetched(what, None, cache=default_cache()) is not None


def _refuse_unknown(what: str) -> NoReturn:
    if is_hub_name(what):
        raise ModelError(
            f"{what}: not in the built-in table of shapes, and not fetched. Fetch it once with: {fetch_command(what, None)}. "
            f"Built-in are: {', '.join(KNOWN)}"
        )
    known_shape(what)  # says which model may be meant
    raise AssertionError("a known shape is a model")


def _merging(recipe: Recipe, settings: Settings) -> Merging | None:
    if settings.method == "full":
        return None
    of_base = settings if recipe.merge.base == "dequantized" else replace(settings, method="lora")
    return Merging(of_base, dtype=recipe.merge.dtype, rounding=recipe.merge.rounding)


def _recipe_names() -> set[str]:
    return {recipe.name for recipe in list_recipes()}


def _find_config(recipe: Recipe) -> tuple[PreTrainedConfig, Path | None, str]:
    base = recipe.model.base
    try:
        source = find_base(base, cache=default_cache(), revision=recipe.model.revision)
    except UserError:
        if known_name(base) is None:
            raise
        return known_config(base), None, f"{known_name(base)}, from the built-in table of shapes"
    return load_config(source), source, f"the config of {source}"


def _choose_card(recipe: Recipe, named: Card | None, *, is_for_a_card: bool) -> tuple[Card, str]:
    if named is not None:
        if recipe.device == "cpu":
            raise UserError("--card plans for a card, and the recipe says device: cpu. Leave one of them out")
        return named, f"{named.in_words}: asked for"
    card, reason = (card_here(), "cuda: asked for") if recipe.device == "cuda" else choose_device(recipe.device)
    if card is not None and not (card.is_cpu and recipe.device == "auto" and is_for_a_card):
        return card, reason
    asked = "cuda was asked for and is not here, so this plans for " if recipe.device == "cuda" else ""
    return COMMON_CARD, (
        f"{asked}{COMMON_CARD.in_words}, a common card, though none is here; --card NAME plans for yours (plan --cards lists them), "
        "--set device=cpu for the processor"
    )


def _with_scored(recipe: Recipe, needs: Needs, source: Path | None, positions: int | None, *, has_data: bool) -> Needs:
    """See `with_scored`; held-out rows that cannot be read count as long as training's."""
    cache, folder = default_cache(), source or Path()
    try:
        return with_scored(recipe, needs, folder, cache, window=positions, is_looked_at=has_data and source is not None)
    except UserError:
        return with_scored(recipe, needs, folder, cache, window=positions, is_looked_at=False)


def _needs(recipe: Recipe, source: Path | None, positions: int | None, *, has_data: bool) -> Needs:
    asked = recipe.data.max_seq_length
    assumed = min(_ASSUMED_LENGTH, positions or _ASSUMED_LENGTH)
    known = Needs(
        assumed,
        "assumed, there are no data to look at",
        _ASSUMED_LABEL_SHARE,
        num_scored=num_scored(recipe),
        max_new_tokens=recipe.eval.max_new_tokens,
    )
    if asked != "auto":
        return replace(known, length=asked, reason="asked for")
    if not has_data or source is None:
        return known
    try:
        return needs_of(recipe, source, default_cache(), limit=positions)
    except UserError as error:
        return replace(known, reason=f"assumed, because the data cannot be read ({error})")
