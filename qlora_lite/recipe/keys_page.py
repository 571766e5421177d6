"""The page `recipe-keys` of the documentation: every key of a recipe, rendered from schema.py as Markdown.

    python -m qlora_lite.recipe.keys_page > qlora_lite/docs/recipe-keys.md

tests/test_docs.py compares the stored page with this rendering.
"""

import inspect
import sys
from functools import partial
from typing import Any

from qlora_lite.recipe import checks
from qlora_lite.recipe.schema import known_keys, section_types
from qlora_lite.recipe.wording import description, expected

_HEAD = """# Recipe keys

This page is generated from the recipe schema, so it has every key of this version.

A recipe is a YAML file. Every key has a default, so a recipe may be a few lines. The plan resolves each `auto`, and every automatic
choice is printed with its reason. An unknown key, a wrong type or a value out of range is an error with its line; all errors of a file
are listed at once. On the command line `--set section.key=value` overrides a key.

For completion and descriptions in editors, run `qlora-lite recipes schema > recipe.schema.json` and write this first line in the
recipe: `# yaml-language-server: $schema=recipe.schema.json`.
"""


def recipe_keys_page() -> str:
    """Return the page as Markdown: one table per section, one line per key with allowed values, default and meaning."""
    defaults, sections = known_keys(), section_types()
    parts = [_HEAD, "## The recipe\n", _table([key for key in defaults if "." not in key])]
    for name, section in sections.items():
        keys = [key for key in defaults if key.startswith(f"{name}.")]
        parts += [f"## {name}\n", f"{inspect.getdoc(section)}\n", _table(keys)]
    return "\n".join(parts)


def _table(keys: list[str]) -> str:
    lines = ["| key | type and allowed values | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = _as_written(known_keys()[key])
        cells = [
            f"`{key}`",
            expected(key, is_refused=partial(checks.is_refused, key)),
            f"`{default}`",
            description(key),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _as_written(default: Any) -> str:
    """Return a default as YAML text."""
    match default:
        case None:
            return "null"
        case bool():
            return "true" if default else "false"
        case tuple():
            return f"[{', '.join(default)}]"
        case _:
            return str(default)


if __name__ == "__main__":
    sys.stdout.write(recipe_keys_page())
