"""Every shipped recipe passes `check` as it is, its model stood in for by config and tokenizer of the same kind (no weights)."""

import json
import re
from pathlib import Path

import pytest

from qlora_lite.recipe import list_recipes, show_recipe
from tests.architectures import published_config
from tests.data.families import FAMILIES
from tests.tiny_run import run_cli

NAMES = [recipe.name for recipe in list_recipes()]
# What the recipe's model is: a row of tests/architectures.py and a family of chat templates.
STANDS_FOR = {
    "smollm2-135m": ("smollm2", "chatml"),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3", "llama3"),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama3_tied", "llama3"),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", "chatml"),
    "Qwen/Qwen3-8B": ("qwen3", "qwen"),
    "bigscience/bloom-560m": ("bloom", "plain"),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", "mistral_v3"),
}


def stand_in(base: str, folder: Path) -> Path:
    """config.json and tokenizer of the kind that `base` has; room for as many positions."""
    architecture, family = STANDS_FOR[base]
    folder.mkdir()
    config = published_config(architecture)
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = 32_768
    (folder / "config.json").write_text(json.dumps(config))
    FAMILIES[family].tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_passes_check_with_its_kind_of_model(name, tmp_path):
    named = re.search(r"^  base: (\S+)", show_recipe(name), re.M)
    assert named is not None
    base = stand_in(named[1], tmp_path / "model")
    # The tiny tokenizer has three to five times as many tokens a word: whatever is cut or left out must be few.
    found = run_cli("check", name, "--set", f"model.base={base}", "--set", "data.max_seq_length=4096", "--json").json
    report = found if "rows" in found else found["recipes"][0]
    assert report["num_rows"] >= 40 and report["num_dropped"] == 0 and len(report["rows"]) == 3
    for row in report["rows"]:
        assert any(is_trained for _, is_trained in row["tokens"])
    expected = {"mistral-7b_chat": "chat", "smollm2-135m_text": "text"}
    assert expected.get(name, "squad") in report["format"].lower()
