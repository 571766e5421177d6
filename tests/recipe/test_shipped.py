"""The shipped recipes load, cover the format, and can be copied without harm; the schema serves an editor."""

import json
import re

import pytest

from qlora_lite.base.shipped import SHIPPED
from qlora_lite.errors import UserError
from qlora_lite.recipe import (
    DEFAULT_RECIPE,
    SHIPPED_MODELS,
    Recipe,
    copy_recipe,
    list_recipes,
    load_recipe,
    recipe_json_schema,
    recipes_dir,
    show_recipe,
)
from qlora_lite.recipe.schema import known_keys, section_types

HERE = ["model.base=smollm2-135m"]  # the hub's models have not been fetched in a test
NAMES = [recipe.name for recipe in list_recipes()]


def test_the_default_recipe_comes_first_and_every_recipe_says_what_it_is():
    assert NAMES[0] == DEFAULT_RECIPE
    assert len(NAMES) == len(list(recipes_dir().glob("*.yaml"))) >= 2
    for recipe in list_recipes():
        assert recipe.description.endswith(".") and len(recipe.description) > 40


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_by_name_by_file_name_and_by_path(name):
    recipe = load_recipe(name, overrides=HERE)
    path = recipes_dir() / f"{name}.yaml"
    assert recipe == load_recipe(f"{name}.yaml", overrides=HERE) == load_recipe(path, overrides=HERE)
    assert (recipe.name, recipe.path) == (name, recipes_dir() / f"{name}.yaml")
    assert recipe.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_it_does_what_it_needs_and_how_to_run_it(name):
    text = show_recipe(name)
    for heading in ("# What: ", "# Needs: ", "# Run: "):
        assert f"\n{heading}" in text
    assert f"{name}" in text and "qlora-lite train" in text
    assert "memory" in text
    assert max(map(len, text.splitlines())) <= 125


# What the default recipe sets otherwise, because it trains a very small model for 32 steps.
OWN_VALUES = {"data": {"num_train": 512}, "train": {"learning_rate": 1e-3}, "memory": {"budget": 512 * 2**20}}


def test_the_default_recipe_writes_out_every_key_with_its_default_but_three():
    text = show_recipe(DEFAULT_RECIPE)
    written = re.findall(r"^ {2}(\w+): ", text, re.M) + re.findall(r"^(\w+): ", text, re.M)
    assert sorted(written) == sorted(key.rpartition(".")[2] for key in known_keys())
    loaded, defaults = load_recipe(DEFAULT_RECIPE).model_dump(), Recipe().model_dump()
    for key in ("train", "eval"):
        assert loaded["data"].pop(key) == str(recipes_dir() / defaults["data"].pop(key))
    for section, values in OWN_VALUES.items():
        defaults[section] |= values
    assert loaded == defaults


def test_the_names_of_shipped_models_are_those_that_can_be_brought():
    assert set(SHIPPED_MODELS) == set(SHIPPED)


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_recipe_brings_its_data_and_loads_alone(tmp_path, monkeypatch, name):
    target = tmp_path / "mine" / "copy.yaml"
    written = copy_recipe(name, target)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(target, overrides=HERE)
    assert written == (target.parent / recipe.data.train, target.parent / recipe.data.eval, target)
    assert target.read_text(encoding="utf-8") == show_recipe(name)


def test_copying_overwrites_nothing_but_shares_equal_data(tmp_path):
    copy_recipe(DEFAULT_RECIPE, tmp_path)
    with pytest.raises(UserError, match="would be overwritten"):
        copy_recipe(DEFAULT_RECIPE, tmp_path)
    (tmp_path / f"{DEFAULT_RECIPE}.yaml").unlink()
    assert copy_recipe(DEFAULT_RECIPE, tmp_path) == (tmp_path / f"{DEFAULT_RECIPE}.yaml",)
    (tmp_path / f"{DEFAULT_RECIPE}.yaml").unlink()
    data = tmp_path / "country_qa" / "train.json"
    data.write_text("mine")
    with pytest.raises(UserError, match=r"train\.json would be overwritten"):
        copy_recipe(DEFAULT_RECIPE, tmp_path)
    assert data.read_text() == "mine" and not (tmp_path / f"{DEFAULT_RECIPE}.yaml").exists()


def test_recipes_are_found_in_a_wheel_and_their_absence_is_a_users_error(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "qlora_lite"
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    with pytest.raises(UserError, match="reinstall qlora_lite"):
        recipes_dir()
    (package / "_recipes").mkdir(parents=True)
    (package / "_recipes" / f"{DEFAULT_RECIPE}.yaml").write_text("# A recipe.\nmethod: qlora\n")
    assert recipes_dir() == package / "_recipes"
    assert [(recipe.name, recipe.description) for recipe in list_recipes()] == [(DEFAULT_RECIPE, "A recipe.")]


def test_copying_to_an_impossible_place_or_an_unknown_name_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot copy"):
        copy_recipe(DEFAULT_RECIPE, tmp_path / "file" / "below.yaml")
    with pytest.raises(UserError, match="did you mean smollm2-135m_squad"):
        copy_recipe("smollm2-135m_squd", tmp_path)
    with pytest.raises(UserError, match="no shipped recipe"):
        show_recipe("../pyproject")


def test_the_schema_is_json_and_describes_every_key():
    schema = json.loads(json.dumps(recipe_json_schema(), allow_nan=False))
    assert schema["additionalProperties"] is False
    sections = section_types()
    described = {}
    for name, entry in schema["properties"].items():
        assert entry["description"]
        if name in sections:
            section = schema["$defs"][sections[name].__name__]
            assert section["additionalProperties"] is False
            described |= {f"{name}.{key}": inner for key, inner in section["properties"].items()}
        else:
            described[name] = entry
    assert list(described) == list(known_keys())
    for key, entry in described.items():
        assert len(entry["description"]) > 15 and entry["description"].endswith("."), key
        assert "default" in entry, key
    assert "In this version: use auto or sdpa." in described["model.attention"]["description"]
