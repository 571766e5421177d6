"""The wording of a recipe error: the allowed values, the value given, and the nearest valid key.

All of it is derived from `schema.py`, so a new key needs no text here.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from qlora_lite.recipe import yaml_text
from qlora_lite.recipe.schema import LARGEST_COUNT, Recipe, known_keys, section_types

_LONGEST_SHOWN = 60

# Names in other tools, too far in spelling from ours.
_ELSEWHERE = {
    "lr": "train.learning_rate",
    "batch_size": "train.examples_per_step",
    "per_device_train_batch_size": "train.examples_per_step",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "num_train_epochs": "train.epochs",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
}


@functools.cache
def _schemas() -> dict[str, dict[str, Any]]:
    """Full key -> the JSON schema of its value."""
    schemas: dict[str, dict[str, Any]] = {}
    sections = section_types()
    for name, schema in Recipe.model_json_schema()["properties"].items():
        if name in sections:
            properties = sections[name].model_json_schema()["properties"]
            schemas |= {f"{name}.{key}": inner for key, inner in properties.items()}
        else:
            schemas[name] = schema
    return schemas


def allowed_words(key: str) -> tuple[str, ...]:
    """Return the words a key accepts (`auto`, `bf16`, ...), including those this version does not support."""
    parts = _schemas()[key].get("anyOf", [_schemas()[key]])
    return tuple(word for part in parts for word in (part.get("enum") or [part.get("const")]) if word is not None)


def description(key: str) -> str:
    """Return the description of a key in schema.py."""
    return str(_schemas()[key]["description"])


def expected(key: str, *, is_refused: Callable[[Any], bool] = lambda value: False) -> str:
    """`lora.r` -> "a whole number from 1 to 4,096"; omits the values for which `is_refused` is true."""
    schema = _schemas()[key]
    words: list[str] = []
    for part in schema.get("anyOf", [schema]):
        if "anyOf" in schema and "title" in part:
            words.append(part["title"])
        elif "enum" in part or "const" in part:
            words += [f'"{word}"' for word in part.get("enum", [part.get("const")]) if not is_refused(word)]
        elif part.get("type") == "boolean":
            words += [shown for shown, value in (("true", True), ("false", False)) if not is_refused(value)]
        elif part.get("type") != "null" or not is_refused(None):
            words.append(_words_of_type(part))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _words_of_type(part: dict[str, Any]) -> str:
    match part.get("type"):
        case "integer" | "number":
            return _words_of_number(part)
        case "string":
            return "text that is not blank" if "pattern" in part else "text"
        case "array":
            words = [f'"{word}"' for word in part["items"].get("enum", ())]
            return f"a list of {_any_of(words)}" if words else "a list of names such as [a, b]"
        case other:
            return str(other)


def _words_of_number(part: dict[str, Any]) -> str:
    noun = "a whole number" if part["type"] == "integer" else "a number"
    low, high = part.get("minimum"), part.get("maximum")
    if part["type"] == "integer":
        if high == LARGEST_COUNT:
            return f"{noun} above {low - 1}" if low == 1 else f"{noun} of at least {low}"
        return f"{noun} from {low:,} to {high:,}"
    above, below = part.get("exclusiveMinimum"), part.get("exclusiveMaximum")
    low_words = f"above {above:g}" if above is not None else f"of at least {low:g}"
    return f"{noun} {low_words} and " + (f"below {below:g}" if below is not None else f"at most {high:,.10g}")


def got(value: Any, source: str = "") -> str:
    """Return a value as text that is safe on a terminal: quoted, shortened, without control characters."""
    match value:
        case None:
            return "null" if source.strip() else "nothing"
        case str():
            return quoted(value)
        case yaml_text.Mapping():
            return "a mapping"
        case list() | tuple():
            return printable("[" + ", ".join("null" if item is None else got(item) for item in value) + "]")
        case bool():
            return "true" if value else "false"
        case _:
            return printable(source or repr(value))


def quoted(text: str) -> str:
    return f'"{printable(text)}"'


def printable(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """Shorten `text`, and escape broken Unicode and control characters, which could move the cursor."""
    short = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


def printable_path(path: str) -> str:
    return printable(path, longest=400)


def nearest(word: str, words: Sequence[str]) -> str | None:
    """Return the word nearest in spelling, or None when none is near."""
    return next(iter(near_names(word, words, most=1)), None)


def near_names(word: str, words: Sequence[str], *, most: int = 3) -> list[str]:
    """Return up to `most` words that are near in spelling, the nearest first."""
    lower = {candidate.lower(): candidate for candidate in words}
    return [lower[name] for name in difflib.get_close_matches(word.lower()[:100], lower, n=most, cutoff=0.6)]


def nearest_key(key: str) -> str:
    """`train.learning_rat` -> "did you mean train.learning_rate?", also for a valid key in the wrong section."""
    keys, sections = list(known_keys()), list(section_types())
    section, _, last = key.rpartition(".")
    if key in keys:  # in a file, `train.epochs: 3` as one word
        return f"write it as two lines, {section}: and below it {last}:"
    by_last: dict[str, list[str]] = {}
    for known in keys:
        by_last.setdefault(known.rpartition(".")[2], []).append(known)
    if last in _ELSEWHERE:
        return f"did you mean {_ELSEWHERE[last]}?"
    if last in by_last:  # valid key, wrong section
        near = nearest(section, sections) if section else None
        same_section = [known for known in by_last[last] if known == f"{near}.{last}"]
        return f"did you mean {_any_of(same_section or by_last[last])}?"
    if section in sections:
        siblings = [known for known in keys if known.startswith(f"{section}.")]
        near = nearest(last, [known.rpartition(".")[2] for known in siblings])
        if near:
            return f"did you mean {section}.{near}?"
    if not section:
        near = nearest(last, [*sections, *(known for known in keys if "." not in known)])
        if near:
            return f"did you mean {near}?"
    near = nearest(last, list(by_last))
    if near:
        return f"did you mean {_any_of(by_last[near])}?"
    if section in sections:
        return f"{section} has " + ", ".join(
            known.rpartition(".")[2] for known in keys if known.startswith(f"{section}.")
        )
    return "a recipe has " + ", ".join(Recipe.model_fields)


def _any_of(keys: Sequence[str]) -> str:
    return " or ".join(keys)
