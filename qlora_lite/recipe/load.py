"""A recipe file -> a `Recipe`, or one `RecipeError` that lists every problem.

The stages, each adding to the same list of problems:

    text -> entries (full key -> value and line)      yaml_text; --set entries replace those of the file
         -> only known keys                           wording.nearest_key for unknown ones
         -> typed values                              schema; the default replaces a bad value, and the checks go on
         -> absolute paths                            checks.find_*
         -> supported values                          checks.refusals
         -> no contradictions                         checks.contradictions
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_lite.errors import RecipeError, UserError
from qlora_lite.limits import RECIPE_BYTES
from qlora_lite.recipe import checks, shipped, wording, yaml_text
from qlora_lite.recipe.reason import Reason
from qlora_lite.recipe.schema import Recipe, known_keys, section_types


@dataclass(frozen=True)
class _Entry:
    """One `key: value` of the file or of --set; `where` is "line 7" or "--set train.seed=1"."""

    value: Any
    source: str
    where: str
    order: int


class _Problems:
    """The problems of all stages, formatted in the order of their lines."""

    def __init__(self) -> None:
        self._problems: list[tuple[int, str, str]] = []

    def add(self, where: str, order: int, text: str) -> None:
        self._problems.append((order, where, text))

    def lines(self) -> list[str]:
        problems = sorted(dict.fromkeys(self._problems), key=lambda problem: problem[0])
        width = max((len(where) for _, where, _ in problems if where.startswith("line ")), default=0)
        width = max(width, len("line 10"))
        return [
            f"{where:<{width}} {text}" if where.startswith("line ") else f"{where}  {text}"
            for _, where, text in problems
        ]


def load_recipe(
    path_or_name: str | os.PathLike[str], *, overrides: Sequence[str] = (), files_must_exist: bool = True
) -> Recipe:
    """Read a recipe by path, or a shipped one by name, with `section.key=value` overrides as in `--set`.

    Makes the paths of data files and of the base model absolute: looked up beside the recipe, then in the current
    folder; only a plan allows missing files (`files_must_exist`). Raises RecipeError with every problem.
    """
    return _load(_find(path_or_name), overrides, files_must_exist=files_must_exist)


def load_run_recipe(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> Recipe:
    """Read the `recipe.yaml` of a run, as `dump_recipe` wrote it, with `overrides`; its data and base may be missing.

    So `ask` works without the training data; the code that needs a file reports it missing. Raises RecipeError.
    """
    return _load(Path(path), overrides, files_must_exist=False)


def _load(path: Path, overrides: Sequence[str], *, files_must_exist: bool) -> Recipe:
    problems = _Problems()
    entries, encoding = _file_entries(path, problems)
    entries |= _override_entries(overrides, problems)
    values = _typed(entries, problems)
    notes = _resolve_files(values, entries, path.parent, problems if files_must_exist else _Problems())
    recipe = _whole(values)
    _check(recipe, values, entries, problems)
    lines = problems.lines()
    if lines:
        raise RecipeError(wording.printable_path(str(path)), lines)
    return recipe.with_origin(name=path.stem, path=Path(os.path.abspath(path)), notes=encoding + notes)


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML text with every key, which `load_recipe` reads back as an equal recipe: the `recipe.yaml` of a run."""
    origin = f" (from {wording.printable_path(str(recipe.path))})" if recipe.path else ""
    head = f"# The recipe of this run, every key in full{origin}.\n"
    values = recipe.model_dump()
    for section in section_types():
        values[section] = {key: list(v) if isinstance(v, tuple) else v for key, v in values[section].items()}
    return head + yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 (other tools) or 1.2 (yaml_text) would read as another value."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if yaml_text.plain_value(data) == data else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    text = os.fspath(path_or_name)
    shown = wording.printable_path(text)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    missing = "is a folder; give a .yaml file" if os.path.isdir(path) else "no such file"
    if os.path.dirname(text) == "":
        try:
            return shipped.recipe_file(text)
        except UserError as error:
            raise RecipeError(shown, [f"{missing}, and {error}"]) from error
    names = [recipe.name for recipe in shipped.list_recipes()]
    hint = f"; did you mean the shipped recipe {path.stem}?" if path.stem in names else ""
    raise RecipeError(shown, [f"{missing}{hint}"])


def _file_entries(path: Path, problems: _Problems) -> tuple[dict[str, _Entry], tuple[Reason, ...]]:
    """-> (full key -> entry, notes on the encoding). Raises RecipeError at once for text that is not a YAML mapping."""
    shown = wording.printable_path(str(path))
    try:
        with open(path, "rb") as file:
            text, encoding = yaml_text.decode(file.read(RECIPE_BYTES + 1))
        top = yaml_text.parse(text)
    except OSError as error:
        raise RecipeError(shown, [f"cannot be read: {error.strerror or error}"]) from error
    except yaml_text.YamlProblem as error:
        raise RecipeError(shown, [f"line {error.line:<2} {wording.printable(error.text, longest=400)}"]) from error
    if top.value is None:
        raise RecipeError(shown, ["is empty; every key has a default, but set at least one, such as method: qlora"])
    if not isinstance(top.value, yaml_text.Mapping):
        got = wording.got(top.value, top.source)
        raise RecipeError(shown, [f"line {top.line:<2} expected sections and keys such as method: qlora, got {got}"])
    entries: dict[str, _Entry] = {}
    seen: dict[str, int] = {}
    for key, node in _flatten(top.value, seen, problems):
        entries.setdefault(key, _Entry(node.value, node.source, f"line {node.line}", node.line))
    return entries, (Reason("", "", f"the recipe is {encoding}"),) if encoding else ()


def _flatten(top: yaml_text.Mapping, seen: dict[str, int], problems: _Problems) -> list[tuple[str, yaml_text.Node]]:
    """Sections and keys -> (full key, node) of known keys; unknown and repeated keys become problems."""
    sections, keys = section_types(), known_keys()
    known = []
    for name, node in top.items:
        if _is_repeated(name, node, seen, problems) and name not in sections:
            continue  # both halves of a repeated section are checked
        section = name
        if name not in Recipe.model_fields:
            _add_unknown(name, node, problems)
            # check the keys below a misspelt section too, under the nearest section name
            section = wording.nearest(name, list(sections)) or ""
            if not section or not isinstance(node.value, yaml_text.Mapping):
                continue
        if section not in sections:
            known.append((name, node))
        elif isinstance(node.value, yaml_text.Mapping):
            for key, inner in node.value.items:
                if _is_repeated(f"{name}.{key}", inner, seen, problems):
                    continue
                if f"{section}.{key}" in keys:
                    known.append((f"{section}.{key}", inner))
                else:
                    _add_unknown(f"{name}.{key}", inner, problems)
        elif node.value is not None:  # `lora:` with every key commented out is a section of defaults
            _add_section_problem(section, node, f"line {node.line}", node.line, problems)
    return known


def _is_repeated(key: str, node: yaml_text.Node, seen: dict[str, int], problems: _Problems) -> bool:
    if key not in seen:
        seen[key] = node.line
        return False
    text = f"{wording.printable(key)}: given twice, first on line {seen[key]}; keep one of them"
    problems.add(f"line {node.line}", node.line, text)
    return True


def _add_unknown(key: str, node: yaml_text.Node, problems: _Problems) -> None:
    text = f"{wording.printable(key)}: unknown key; {wording.nearest_key(key)}"
    problems.add(f"line {node.line}", node.line, text)


def _add_section_problem(section: str, node: yaml_text.Node, where: str, order: int, problems: _Problems) -> None:
    first = next(key for key in known_keys() if key.startswith(f"{section}."))
    got = wording.got(node.value, node.source)
    problems.add(where, order, f"{section}: expected keys below it, such as {first}, got {got}")


def _override_entries(overrides: Sequence[str], problems: _Problems) -> dict[str, _Entry]:
    """`["train.seed=1"]` -> entries; the last override of a key wins."""
    entries: dict[str, _Entry] = {}
    for number, override in enumerate(overrides):
        where, order = f"--set {wording.printable(override)}", 2**40 + number
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.add(where, order, "expected section.key=value, such as --set train.max_steps=10")
            continue
        if not text.strip():
            problems.add(where, order, f"{wording.printable(key)}: no value after the =; write null for no value")
            continue
        try:
            node = yaml_text.parse_value(text)
        except yaml_text.YamlProblem as error:
            problems.add(where, order, f"{wording.printable(key)}: {wording.printable(error.text, longest=400)}")
            continue
        if key in section_types():
            _add_section_problem(key, node, where, order, problems)
        elif key not in known_keys():
            problems.add(where, order, f"{wording.printable(key)}: unknown key; {wording.nearest_key(key)}")
        else:
            entries[key] = _Entry(node.value, node.source, where, order)
    return entries


def _typed(entries: dict[str, _Entry], problems: _Problems) -> dict[str, Any]:
    """Return the values with a valid type and range, by full key."""
    values = {key: _plain(entry.value) for key, entry in entries.items()}
    try:
        _whole(values)
    except ValidationError as error:
        for key in dict.fromkeys(_key_of(part["loc"]) for part in error.errors(include_url=False)):
            entry = entries[key]
            expected = wording.expected(key, is_refused=partial(checks.is_refused, key))
            hint = _value_hint(key, entry)
            got = wording.got(entry.value, entry.source)
            problems.add(entry.where, entry.order, f"{key}: expected {expected}, got {got}{hint}")
            del values[key]
    return values


def _plain(value: Any) -> Any:
    """Return `value` with the mappings in a list, such as {path: ..., weight: ...}, as dicts."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(node.value) for key, node in value.items} if isinstance(value, yaml_text.Mapping) else value


def _value_hint(key: str, entry: _Entry) -> str:
    if isinstance(entry.value, str):
        near = wording.nearest(entry.value, wording.allowed_words(key))
        return f"; did you mean {near}?" if near else ""
    if isinstance(entry.value, bool | int | float) and wording.expected(key).startswith("text"):
        return f"; if it is text, quote it: {wording.quoted(entry.source)}"
    return ""


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location[: 2 if location[0] in section_types() else 1])


def _whole(values: dict[str, Any]) -> Recipe:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = value
    return Recipe.model_validate(nested)


def _resolve_files(
    values: dict[str, Any], entries: dict[str, _Entry], folder: Path, problems: _Problems
) -> tuple[Reason, ...]:
    """Make the paths in `values` absolute and return notes on automatic choices. A default data file is a shipped one."""
    notes: list[Reason] = []
    train, held_out = entries.get("data.train"), entries.get("data.eval")
    if train and not held_out:
        values["data.eval"] = None
        why = "null, because only data.train is given; without data.eval there are no scores"
        notes.append(Reason("data.eval", "", why))
    if train and held_out and train.where.startswith("--set") and held_out.value and held_out.where.startswith("line"):
        why = f"data.train comes from --set, data.eval from the recipe ({wording.got(held_out.value)})"
        notes.append(Reason("", "", why))
    recipe = _whole(values)
    folders = [folder, Path.cwd()]
    wanted = {"model.base": recipe.model.base, "data.train": recipe.data.train, "data.eval": recipe.data.eval}
    for key, value in wanted.items():
        if value is None or (key in entries and key not in values):  # null, or already a problem
            continue
        if isinstance(value, tuple):
            checked = [checks.find_data_file(key, file.path, folders) for file in value]
            values[key] = [
                {"path": path, "weight": file.weight} for (path, _), file in zip(checked, value, strict=True)
            ]
            path_problems = [problem for _, file_problems in checked for problem in file_problems]
        elif key == "model.base":
            values[key], path_problems = checks.find_base(value, folders, revision=recipe.model.revision)
        else:
            values[key], path_problems = checks.find_data_file(
                key, value, folders if key in entries else [*folders, shipped.recipes_dir()]
            )
        _add_all(path_problems, entries, problems)
    if recipe.lora.init_from is not None:
        values["lora.init_from"], path_problems = checks.find_adapter(recipe.lora.init_from, folders)
        path_problems = path_problems or checks.adapter_differences(_whole(values))
        wrong = entries.keys() - values.keys()
        _add_all([problem for problem in path_problems if problem[0] not in wrong], entries, problems)
    return tuple(notes)


def _check(recipe: Recipe, values: dict[str, Any], entries: dict[str, _Entry], problems: _Problems) -> None:
    """Add unsupported values and contradictions to `problems`, skipping keys that already have a problem."""
    wrong = entries.keys() - values.keys()
    dumped = recipe.model_dump()
    flat = {
        key: dumped[key] if "." not in key else dumped[key.split(".")[0]][key.split(".")[1]] for key in known_keys()
    }
    right = {key: value for key, value in flat.items() if key not in wrong}
    _add_all(checks.refusals(right, {key: entry.source for key, entry in entries.items()}), entries, problems)
    _add_all(
        [(keys[0], text) for keys, text in checks.contradictions(recipe) if not wrong.intersection(keys)],
        entries,
        problems,
    )


def _add_all(key_problems: Sequence[checks.KeyProblem], entries: dict[str, _Entry], problems: _Problems) -> None:
    for key, text in key_problems:
        entry = entries.get(key)
        problems.add(entry.where if entry else "default", entry.order if entry else 2**41, f"{key}: {text}")
