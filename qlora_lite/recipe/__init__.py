"""Describe: YAML -> `Recipe`, strict and typed, with every error at once.

Gives the next stages: a frozen `Recipe` whose data files are absolute paths and whose every value is one that this
version carries out. `auto` is still in it; the plan resolves that. Only `recipe`, `plan` and `pipeline` see a Recipe.
Imports neither torch nor transformers, so that a misspelt key is reported at once.

    yaml_text.py    text -> values that know their line, whatever the file holds
    schema.py       the keys: type, range, default, meaning
    not_yet.py      what this version refuses by name
    checks.py       files and contradictions
    hub_names.py    org/name -> the folder that fetch made
    wording.py      expected, got, did you mean
    load.py         load_recipe, dump_recipe, load_run_recipe
    shipped.py      the recipes and model names that come with the package
    json_schema.py  the same keys for editors
"""

from qlora_lite.recipe.hub_names import parse_hub_name
from qlora_lite.recipe.json_schema import recipe_json_schema
from qlora_lite.recipe.load import dump_recipe, load_recipe, load_run_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.recipe.shipped import (
    DEFAULT_RECIPE,
    SHIPPED_MODELS,
    ShippedRecipe,
    copy_recipe,
    list_recipes,
    recipes_dir,
    show_recipe,
)

__all__ = [
    "DEFAULT_RECIPE",
    "SHIPPED_MODELS",
    "Recipe",
    "ShippedRecipe",
    "copy_recipe",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "load_run_recipe",
    "parse_hub_name",
    "recipe_json_schema",
    "recipes_dir",
    "show_recipe",
]
