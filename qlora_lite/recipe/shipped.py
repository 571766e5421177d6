"""The recipes and the model names that come with the package.

Recipes are the `.yaml` files of one folder, `recipes/` in a source checkout and `qlora_lite/_recipes/` in a wheel,
with the small data files they name. The first line of each file is a comment that describes the recipe.
"""

import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qlora_lite.errors import UserError
from qlora_lite.recipe import wording, yaml_text

DEFAULT_RECIPE = "smollm2-135m_country-qa"

SHIPPED_MODELS: dict[str, str] = {
    "smollm2-135m": "SmolLM2-135M-Instruct (Llama architecture, 135M weights, Apache-2.0); small enough for a CPU",
}


@dataclass(frozen=True)
class ShippedRecipe:
    """One line of `qlora-lite recipes list`."""

    name: str
    description: str


def recipes_dir() -> Path:
    """Return the folder of the shipped recipes. Raises UserError when the installation has none."""
    package = Path(str(resources.files("qlora_lite")))
    for folder in (package / "_recipes", package.parent / "recipes"):
        if (folder / f"{DEFAULT_RECIPE}.yaml").is_file():
            return folder
    raise UserError(f"the shipped recipes are missing from {package}; reinstall qlora_lite")


def list_recipes() -> tuple[ShippedRecipe, ...]:
    """Return every shipped recipe by name, the default first."""
    names = sorted(
        (path.stem for path in recipes_dir().glob("*.yaml")), key=lambda name: (name != DEFAULT_RECIPE, name)
    )
    return tuple(ShippedRecipe(name, _first_comment(show_recipe(name))) for name in names)


def recipe_file(name: str) -> Path:
    """`smollm2-135m_country-qa`, with or without `.yaml` -> its file. Raises UserError with the nearest name."""
    stem = _stem(name)
    names = [path.stem for path in recipes_dir().glob("*.yaml")]
    if stem in names:
        return recipes_dir() / f"{stem}.yaml"
    near = wording.nearest(stem, names)
    hint = f"did you mean {near}?" if near else "shipped recipes: " + ", ".join(sorted(names))
    raise UserError(f"no shipped recipe named {wording.quoted(name)}; {hint}")


def show_recipe(name: str) -> str:
    """Return the text of a shipped recipe, comments included. Raises UserError for an unknown name."""
    return recipe_file(name).read_text(encoding="utf-8")


def copy_recipe(name: str, dest: str | os.PathLike[str] = ".") -> tuple[Path, ...]:
    """Copy a shipped recipe, with the data files it names, to a folder or a `.yaml` file; return the files written.

    Skips a data file that already exists with the same bytes. Raises UserError for an unknown name, and when it would
    overwrite any other file; then nothing is copied.
    """
    source = recipe_file(name)
    target = Path(os.path.expanduser(dest))
    if target.is_dir() or target.suffix.lower() not in (".yaml", ".yml"):
        target = target / source.name
    pairs = [(source.parent / file, target.parent / file) for file in _data_files(source)] + [(source, target)]
    pairs = [(old, new) for old, new in pairs if new == target or not _same_bytes(old, new)]
    taken = [str(new) for _, new in pairs if os.path.lexists(new)]
    if taken:
        raise UserError(f"not copied: {', '.join(taken)} would be overwritten; give another folder, or move the file")
    try:
        for old, new in pairs:  # the recipe comes last, so a copied recipe always has its data
            new.parent.mkdir(parents=True, exist_ok=True)
            with open(old, "rb") as reader, open(new, "xb") as writer:
                shutil.copyfileobj(reader, writer)
    except OSError as error:
        raise UserError(f"cannot copy {source.name} to {target}: {error.strerror or error}") from error
    return tuple(new for _, new in pairs)


def _stem(name: str) -> str:
    for ending in (".yaml", ".yml"):
        name = name.removesuffix(ending)
    return name


def _first_comment(text: str) -> str:
    first = text.split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _data_files(recipe: Path) -> list[str]:
    """Return the relative paths under `data:` that exist beside the recipe."""
    top = yaml_text.parse(recipe.read_text(encoding="utf-8")).value
    data = dict(top.items).get("data") if isinstance(top, yaml_text.Mapping) else None
    values = dict(data.value.items) if data and isinstance(data.value, yaml_text.Mapping) else {}
    texts = [values[key].value for key in ("train", "eval") if key in values and isinstance(values[key].value, str)]
    return [text for text in texts if not os.path.isabs(text) and (recipe.parent / text).is_file()]


def _same_bytes(old: Path, new: Path) -> bool:
    return new.is_file() and old.read_bytes() == new.read_bytes()
