"""Every shipped recipe passes `check` as it is, its model stood in for by config and tokenizer of the same kind (no weights)."""

import json
import math
import re
from pathlib import Path

import pytest

from qlora_lite.recipe import list_recipes, load_recipe, show_recipe
from tests.architectures import published_config
from tests.data.families import FAMILIES
from tests.tiny_run import run_cli

# Published parameters; in + out features of one layer's linear modules, and the layers (from the models' config.json).
PUBLISHED = {
    "llama-3.1-8b_qa-24gb": (8_030_261_248, 2 * 8192 + 2 * 5120 + 3 * 18432, 32),
    "llama-3.2-3b_qa-8gb": (3_212_749_824, 2 * 6144 + 2 * 4096 + 3 * 11264, 28),
    "qwen2.5-7b_qa-24gb": (7_615_616_512, 2 * 7168 + 2 * 4096 + 3 * 22528, 28),
    "qwen3-8b_qa-24gb": (8_190_735_360, 2 * 8192 + 2 * 5120 + 3 * 16384, 36),
    "bloom-560m_qa": (559_214_592, 4096 + 2048 + 2 * 5120, 24),
    "mistral-7b_chat": (7_248_023_552, 2 * 8192 + 2 * 5120 + 3 * 18432, 32),
}
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
# A recipe that has the data, the data settings and the template of another one, whose check reads all rows: here the first are enough.
SAME_ROWS_AS = {"llama-3.2-3b_qa-8gb": "llama-3.1-8b_qa-24gb"}


def stand_in(base: str, folder: Path) -> Path:
    """config.json and tokenizer of the kind that `base` has; room for as many positions."""
    architecture, family = STANDS_FOR[base]
    folder.mkdir()
    config = published_config(architecture)
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = 32_768
    tokenizer = FAMILIES[family].tokenizer()
    config["vocab_size"] = max(config["vocab_size"], len(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def header(name: str) -> str:
    """The recipe's comment in one line, without its marks."""
    lines = [line for line in show_recipe(name).splitlines() if line.startswith("#")]
    return " ".join(" ".join(line.removeprefix("#") for line in lines).split())


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return [float(number) for number in found.groups()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_recipe_says_it_needs_is_the_arithmetic_of_its_model(name):
    num_parameters, features, layers = PUBLISHED[name]
    said, recipe = header(name), load_recipe(name, overrides=["model.base=smollm2-135m"])
    parts = numbers(r"weights (\d+\.\d), adapter and optimizer (\d+\.\d), activations (\d+\.\d)", said)
    assert abs(numbers(r"about (\d+\.\d) GiB", said)[0] - sum(parts)) < 0.15, "each part is rounded"
    factors = recipe.lora.r * features * layers
    assert parts[1] == round(10 * factors / 2**30, 1), "fp32 factors and gradients, two bytes of state"
    sixteen_bits, four_bits = 2 * num_parameters / 1e9, parts[0] * 2**30 / 1e9
    assert numbers(r"(\d+) GB of disk", said)[0] == round(2 * sixteen_bits + four_bits), "base, quantized base, merged"
    assert numbers(r"(\d+) of them for the merged model", said)[0] == round(sixteen_bits)


def test_recipes_say_what_only_their_model_needs():
    for name in NAMES:
        assert ("HF_TOKEN" in header(name)) == name.startswith("llama")
        assert ("enable_thinking=false" in header(name)) == name.startswith("qwen3")


def test_the_early_stop_of_the_chat_recipe_can_act_on_its_own_data():
    recipe = load_recipe("mistral-7b_chat", overrides=["model.base=smollm2-135m"])
    ((path, _),) = recipe.data.train_files
    rows = [json.loads(line)["messages"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert all(messages[0]["role"] == "system" for messages in rows), "so that each turn is an example"
    num_examples = sum(message["role"] == "assistant" for messages in rows for message in messages)
    num_steps = recipe.train.epochs * math.ceil(num_examples / recipe.train.examples_per_step)
    assert f"{num_steps:.0f} steps of the shipped data" in show_recipe("mistral-7b_chat")
    assert num_steps // recipe.train.eval_every_steps > recipe.train.early_stop


@pytest.mark.parametrize(("name", "other"), SAME_ROWS_AS.items())
def test_recipes_whose_rows_are_checked_once_have_the_same_data_and_template(name, other):
    recipes = [
        load_recipe(each, overrides=["model.base=smollm2-135m", "data.max_seq_length=4096"]) for each in (name, other)
    ]
    assert recipes[0].data == recipes[1].data
    bases = [re.search(r"^  base: (\S+)", show_recipe(each), re.M)[1] for each in (name, other)]
    assert STANDS_FOR[bases[0]][1] == STANDS_FOR[bases[1]][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_passes_check_with_its_kind_of_model(name, tmp_path):
    named = re.search(r"^  base: (\S+)", show_recipe(name), re.M)
    assert named is not None
    base = stand_in(named[1], tmp_path / "model")
    # The tiny tokenizer has three to five times as many tokens a word: whatever is cut or left out must be few.
    settings = [
        f"model.base={base}",
        "data.max_seq_length=4096",
        *(["data.num_train=64"] if name in SAME_ROWS_AS else []),
    ]
    found = run_cli("check", name, *(word for setting in settings for word in ("--set", setting)), "--json").json
    report = found if "rows" in found else found["recipes"][0]
    assert report["num_rows"] >= 40 and report["num_dropped"] == 0 and len(report["rows"]) == 3
    for row in report["rows"]:
        assert any(is_trained for _, is_trained in row["tokens"])
    expected = {"mistral-7b_chat": "chat", "smollm2-135m_text": "text"}
    assert expected.get(name, "squad") in report["format"].lower()
