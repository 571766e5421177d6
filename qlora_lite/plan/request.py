"""Requests of the command `plan`: a model's name, a model folder, or a recipe. Needs a config only; loads and fetches nothing.

In: `llama-3.1-8b`, `meta-llama/Llama-3.1-8B`, a folder, or a recipe's path or name. Out: `Resolved`, with a reason for every guess.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from qlora_lite.base.known import KNOWN, known_config, known_name, known_shape
from qlora_lite.base.source import context_window, find_base, load_config
from qlora_lite.device.accelerator import card_here, choose_device, recipe_word
from qlora_lite.device.card import COMMON_CARD, Card
from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.cache import default_cache
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.model.dtypes import choose_types
from qlora_lite.plan.budget import budget_of, host_budget_of, measured_here
from qlora_lite.plan.needs import Needs, choose_format, needs_of, num_scored, with_scored
from qlora_lite.plan.resolve import Base, Place, Resolved, free_of, refuse_wrong_modules, resolve
from qlora_lite.recipe import DEFAULT_RECIPE, Reason, Recipe, list_recipes, load_recipe
from qlora_lite.recipe.hub_names import commit_of, fetch_command, find_fetched, is_hub_name
from qlora_lite.units import format_bytes

_ASSUMED_LENGTH, _ASSUMED_LABEL_SHARE = 1024, 0.1


def read_request(
    request: str, *, overrides: Sequence[str] = (), budget_bytes: int | None = None, named: Card | None = None
) -> Resolved:
    """Resolve a request; `named` is a card to plan for, present or not. Raises RecipeError for a recipe, UserError for an unknown name."""
    if _is_model(request):
        planned = plan_of_model(request, overrides, budget_bytes=budget_bytes, named=named)
        return replace(planned, reasons=(Reason("settings", "", f"from {DEFAULT_RECIPE}"), *planned.reasons))
    if not Path(request).exists() and not request.endswith((".yaml", ".yml")) and request not in _recipe_names():
        _refuse_unknown(request)
    recipe = load_recipe(request, overrides=overrides, files_must_exist=False)
    return _planned(recipe, overrides, budget_bytes, named, is_model=False)


def plan_of_model(
    name: str, overrides: Sequence[str] = (), *, budget_bytes: int | None = None, named: Card | None = None
) -> Resolved:
    """Resolve the default recipe for another model, without its data and its budget, which suits a small model only."""
    recipe = load_recipe(DEFAULT_RECIPE, overrides=["memory.budget=auto", *overrides], files_must_exist=False)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": name})})
    return _planned(recipe, overrides, budget_bytes, named, is_model=True)


def _planned(
    recipe: Recipe, overrides: Sequence[str], budget_bytes: int | None, named: Card | None, *, is_model: bool
) -> Resolved:
    base, base_reason = _find_base(recipe)
    refuse_wrong_modules(recipe, base.config)
    is_set = any(override.startswith("memory.budget=") for override in overrides)
    place = _place_of(recipe, named, budget_bytes, is_model=is_model, budget_is_set=is_set)
    has_data = not is_model and base.source is not None
    recipe, format_reason = _with_format(recipe) if has_data else (recipe, None)
    resolved = resolve(recipe, base, place, _needs(recipe, base, has_data=has_data), free_of(recipe))
    reasons = (
        Reason("model", "", base_reason),
        *([] if format_reason is None else [Reason("data.format", recipe.data.format, format_reason)]),
        *resolved.reasons,
    )
    return replace(resolved, reasons=reasons)


def _is_model(request: str) -> bool:
    """Whether `request` is a known shape, a model folder or file, or a fetched hub model."""
    path = Path(request)
    if known_name(request) is not None or (path / CONFIG_FILE).is_file() or (path.suffix == ".gguf" and path.is_file()):
        return True
    return is_hub_name(request) and not path.exists() and find_fetched(request, None, cache=default_cache()) is not None


def _refuse_unknown(request: str) -> NoReturn:
    if is_hub_name(request):
        raise ModelError(
            f"{request}: not in the built-in table of shapes, and not fetched. Fetch it with: {fetch_command(request, None)}. "
            f"Built-in names: {', '.join(KNOWN)}"
        )
    known_shape(request)  # raises, with the nearest names
    raise AssertionError("a known shape is a model")


def _recipe_names() -> set[str]:
    return {recipe.name for recipe in list_recipes()}


def _find_base(recipe: Recipe) -> tuple[Base, str]:
    name, revision = recipe.model.base, recipe.model.revision
    try:
        source = find_base(name, cache=default_cache(), revision=revision)
    except UserError:
        if known_name(name) is None:
            raise
        return Base(known_config(name), None), f"{known_name(name)}, from the built-in table of shapes"
    commit = commit_of(source) if is_hub_name(name) else None
    return Base(load_config(source), source, commit), f"the config of {source}"


def _place_of(
    recipe: Recipe, named: Card | None, budget_bytes: int | None, *, is_model: bool, budget_is_set: bool
) -> Place:
    card, reason = _choose_card(recipe, named, is_for_a_card=is_model or budget_bytes is not None)
    measured = measured_here(card, cache=default_cache())
    is_for_another = named is not None and not budget_is_set and budget_bytes is None and recipe.memory.budget != "auto"
    asked = "auto" if is_for_another else recipe.memory.budget
    budget, budget_reason = budget_of(asked if budget_bytes is None else budget_bytes, card, measured=measured)
    if is_for_another:
        assert isinstance(recipe.memory.budget, int)
        budget_reason += f"; --card overrides the recipe's {format_bytes(recipe.memory.budget)}"
    host_budget, host_reason = host_budget_of(recipe.memory.host_budget, card)
    return Place(
        card,
        reason,
        choose_types(recipe.model.dtype, card),
        budget,
        budget_reason,
        measured,
        host_budget_bytes=host_budget,
        host_budget_reason=host_reason,
    )


def _choose_card(recipe: Recipe, named: Card | None, *, is_for_a_card: bool) -> tuple[Card, Reason]:
    if named is not None:
        if recipe.device == "cpu":
            raise UserError("--card plans for a card, but the recipe has device: cpu. Leave out one of them")
        return named, Reason("device", named.in_words, "asked for")
    card, why = (card_here(), "asked for") if recipe.device == "cuda" else choose_device(recipe.device)
    if card is not None and not (card.is_cpu and recipe.device == "auto" and is_for_a_card):
        return card, Reason("device", recipe_word(card), why)
    asked = "cuda was asked for, but " if recipe.device == "cuda" else ""
    return COMMON_CARD, Reason(
        "device",
        COMMON_CARD.in_words,
        f"{asked}this machine has no card, so a common one is assumed; --card NAME plans for yours "
        "(plan --cards lists them), --set device=cpu for the processor",
    )


def _with_format(recipe: Recipe) -> tuple[Recipe, str | None]:
    """-> (the recipe with its data's format, reason; None if the data cannot be read)."""
    try:
        data_format, reason = choose_format(recipe)
    except UserError:
        return recipe, None
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": data_format})}), reason


def _needs(recipe: Recipe, base: Base, *, has_data: bool) -> Needs:
    """Return the needs of the data if it can be read, else assumed ones, with the reason."""
    cache, positions, asked = default_cache(), context_window(base.config), recipe.data.max_seq_length
    is_free = asked == "auto"
    needs = Needs(
        min(_ASSUMED_LENGTH, positions or _ASSUMED_LENGTH) if asked == "auto" else asked,
        "assumed, because there are no data to read" if is_free else "asked for",
        _ASSUMED_LABEL_SHARE,
        num_scored=num_scored(recipe),
        max_new_tokens=recipe.eval.max_new_tokens,
    )
    folder = base.source or Path()
    if has_data:
        try:
            needs = needs_of(recipe, folder, cache, limit=positions)
        except UserError as error:
            unreadable = f"because the data cannot be read ({error})"
            reason = f"assumed, {unreadable}" if is_free else f"asked for; label tokens assumed, {unreadable}"
            needs = replace(needs, reason=reason)
    try:
        return with_scored(recipe, needs, folder, cache, window=positions, is_looked_at=has_data)
    except UserError:  # unreadable held-out rows count as long as training's
        return with_scored(recipe, needs, folder, cache, window=positions, is_looked_at=False)
