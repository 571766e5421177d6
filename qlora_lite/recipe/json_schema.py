"""The recipe format as a JSON schema, for completion and descriptions in editors.

    qlora-lite recipes schema > recipe.schema.json

with this first line in the recipe: `# yaml-language-server: $schema=recipe.schema.json`.
"""

from typing import Any

from qlora_lite.recipe.not_yet import NOT_YET
from qlora_lite.recipe.schema import Recipe, section_types


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe; each key has a description, its default and its range."""
    schema = Recipe.model_json_schema()
    limits = {row.key: row.instead for row in NOT_YET}
    sections = section_types()
    for name, entry in schema["properties"].items():
        if name in sections:
            entry["description"] = sections[
                name
            ].__doc__  # pydantic leaves out a description that repeats the section's
            inner = schema["$defs"][sections[name].__name__]["properties"]
            for key, value in inner.items():
                _add_limit(value, limits.get(f"{name}.{key}"))
        else:
            _add_limit(entry, limits.get(name))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "qlora_lite recipe"}


def _add_limit(entry: dict[str, Any], limit: str | None) -> None:
    entry.pop("title", None)  # pydantic's "Lora Alpha" repeats the key
    if limit:
        entry["description"] += f" In this version: {limit}."
