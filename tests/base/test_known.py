"""The built-in shapes: every model, built on meta, has exactly the weights that are published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from qlora_lite.base.known import KNOWN, known_config, known_name, known_shape
from qlora_lite.base.known_shapes import HEAD_TWICE, SHAPES, VISION
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import ARCHITECTURES, context_window, load_config
from qlora_lite.errors import ModelError
from qlora_lite.recipe.shipped import SHIPPED_MODELS

ROOT = Path(__file__).resolve().parents[2]
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


def num_weights(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def names_because_of(why: str) -> list[str]:
    return [name for name, shape in SHAPES.items() if shape.why == why]


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_shape_has_as_many_weights_as_are_published(name):
    assert num_weights(empty_model(known_config(name))) == known_shape(name).num_weights


def test_the_numbers_that_people_look_up_are_the_published_ones():
    published = {
        "llama-3.1-8b": 8_030_261_248, "llama-3.3-70b": 70_553_706_496, "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-32b": 32_763_876_352, "qwen3-8b": 8_190_735_360, "mistral-7b": 7_248_023_552,
        "gemma-2-9b": 9_241_705_984, "phi-4": 14_659_507_200, "bloom-560m": 559_214_592,
    }  # fmt: skip
    assert {name: known_shape(name).num_weights for name in published} == published
    assert {name: known_shape(name).published for name in published} == published


def test_where_fewer_weights_are_loaded_than_published_the_table_says_why():
    assert {name for name, shape in SHAPES.items() if shape.not_loaded} == {n for n, s in SHAPES.items() if s.why}


@pytest.mark.parametrize("name", names_because_of(VISION))
def test_language_model_and_vision_tower_together_are_the_published_checkpoint(name):
    config = Gemma3Config(text_config=known_config(name).to_dict(), vision_config=SIGLIP)
    with init_empty_weights(include_buffers=False):
        whole = Gemma3ForConditionalGeneration(config)
    whole.tie_weights()
    assert num_weights(whole) == known_shape(name).published


@pytest.mark.parametrize("name", names_because_of(HEAD_TWICE))
def test_a_head_that_is_published_beside_its_embedding_is_counted_once(name):
    model = empty_model(known_config(name))
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert known_shape(name).not_loaded == embedding.numel()


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen3-4b", "gemma-3-1b", "phi-4", "bloom-7b1"])
def test_a_head_is_the_embedding_exactly_where_the_config_ties_them(name):
    config = known_config(name)
    model = empty_model(config)
    is_one = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_one == config.tie_word_embeddings == known_shape(name).config["tie_word_embeddings"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_config_is_what_the_loader_reads_from_a_folder(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(known_shape(name).config))
    known, loaded = known_config(name), load_config(tmp_path)
    assert (known.name_or_path, loaded.name_or_path) == (known_shape(name).source, str(tmp_path))
    loaded.name_or_path = known.name_or_path
    assert known.to_dict() == loaded.to_dict()
    assert known.model_type in ARCHITECTURES


def test_windows_caps_and_lengths_are_those_of_the_models():
    gemma2, gemma3 = known_config("gemma-2-9b"), known_config("gemma-3-27b")
    assert gemma2.layer_types == ["sliding_attention", "full_attention"] * 21
    assert (gemma2.sliding_window, gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (4096, 50, 30)
    assert gemma3.layer_types == ([*["sliding_attention"] * 5, "full_attention"] * 11)[:62]
    assert (gemma3.sliding_window, gemma3.attn_logit_softcapping, gemma3.final_logit_softcapping) == (1024, None, None)
    assert known_config("qwen2.5-72b").sliding_window is None
    assert known_config("mistral-7b").sliding_window is None
    lengths = {"llama-3.1-8b": 131072, "qwen2.5-7b": 32768, "qwen3-8b": 40960, "falcon-180b": 2048, "bloom-560m": None}
    assert {name: context_window(known_config(name)) for name in lengths} == lengths


def test_a_changed_config_leaves_the_table_as_it_is():
    config = known_config("llama-3.1-8b")
    before = config.to_dict()
    config.num_hidden_layers = 2
    config.rope_parameters["factor"] = 99.0
    assert known_config("llama-3.1-8b").to_dict() == before


def test_names_are_readable_without_torch():
    code = (
        "import sys\nfrom qlora_lite.errors import ModelError\nfrom qlora_lite.base.known import KNOWN, known_shape\n"
        "assert known_shape(KNOWN[0]).num_weights == 8_030_261_248\n"
        "try:\n    known_shape('lama')\nexcept ModelError:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'peft', 'bitsandbytes', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_hub_name_finds_the_same_row():
    assert known_name("meta-llama/Llama-3.1-8B-Instruct") == known_name("Llama-3.1-8B") == "llama-3.1-8b"
    assert known_name("no/such-model") is None
    assert known_config("Qwen/Qwen3-8B").to_dict() == known_config("qwen3-8b").to_dict()


def test_every_shipped_model_has_a_known_shape():
    assert set(SHIPPED_MODELS) <= set(KNOWN)


@pytest.mark.parametrize(
    ("base", "near"),
    [("llama3.1-8b", "llama-3.1-8b"), ("Qwen2.5_7B", "qwen2.5-7b"), ("meta-llama/Llama-3.1-8B", "llama-3.1-8b")],
)
def test_an_unknown_name_is_answered_with_the_nearest(base, near):
    with pytest.raises(ModelError, match=rf'no built-in shape named "{base}"; did you mean {near}\? Known: llama'):
        known_config(base)


def test_a_name_that_is_near_to_none_is_answered_with_the_list():
    with pytest.raises(ModelError, match=r'named "xyz"; Known: llama-3\.1-8b, .*, smollm2-1\.7b$'):
        known_shape("xyz")
