"""The recipe format as a JSON schema, for completion and descriptions in editors.

    qlora-lite recipes schema > recipe.schema.json

with this first line in the recipe: `# yaml-language-server: $schema=recipe.schema.json`.
"""

from typing import Any

from qlora_lite.recipe.checks import ATTENTION_ADVICE
from qlora_lite.recipe.schema import Recipe, section_types


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe; each key has a description, its default and its range."""
    schema = Recipe.model_json_schema()
    sections = section_types()
    for name, entry in schema["properties"].items():
        entry.pop("title", None)  # pydantic's "Lora Alpha" repeats the key
        if name in sections:
            # pydantic leaves out a description that repeats the section's
            entry["description"] = sections[name].__doc__
            for value in schema["$defs"][sections[name].__name__]["properties"].values():
                value.pop("title", None)
    attention = schema["$defs"][sections["model"].__name__]["properties"]["attention"]
    attention["description"] += f" In this version: {ATTENTION_ADVICE}."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "qlora_lite recipe"}
