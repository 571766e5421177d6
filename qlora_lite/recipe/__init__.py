"""recipe: YAML -> `Recipe`, strict and typed, with all errors listed at once.

Out: a frozen `Recipe` with absolute paths of data files and only values that this version supports. It still contains
`auto`, which the plan resolves. Only `recipe`, `plan` and `pipeline` use a Recipe. Imports neither torch nor
transformers, so a misspelt key is reported at once.

    yaml_text.py    text -> values with their lines; safe for any file
    schema.py       the keys: type, range, default, meaning
    reason.py       the reason for one automatic choice
    checks.py       missing files, contradicting keys, values that this version refuses
    hub_names.py    org/name -> the folder that fetch made
    wording.py      expected, got, did you mean
    load.py         load_recipe, dump_recipe, load_run_recipe
    shipped.py      the recipes and model names that come with the package
    json_schema.py  the keys as a JSON schema for editors
    keys_page.py    the keys as the documentation page recipe-keys
"""

from qlora_lite.recipe.hub_names import parse_hub_name
from qlora_lite.recipe.json_schema import recipe_json_schema
from qlora_lite.recipe.load import dump_recipe, load_recipe, load_run_recipe
from qlora_lite.recipe.reason import Reason
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
    "Reason",
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
