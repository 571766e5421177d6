"""Folders that bitsandbytes has quantized, as transformers saves them and as they are published: names, vision towers, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Gemma3ForConditionalGeneration

from qlora_lite.base.artefact import quantize_base
from qlora_lite.base.quantization import Quantization
from qlora_lite.errors import ModelError
from qlora_lite.merging import merge
from qlora_lite.merging.checkpoint import open_checkpoint
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import load_base
from tests.architectures import PUBLISHED, artefact, published, published_config
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_model import gradients, move_factors, random_rows, split_batches

NF4_SINGLE, INT8 = Quantization("nf4", False), Quantization("int8", False)
SMALL_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def bnb_config(quantization: Quantization, **more: Any) -> BitsAndBytesConfig:
    if quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    four_bit = {"bnb_4bit_quant_type": quantization.kind, "bnb_4bit_use_double_quant": quantization.double_quant}
    return BitsAndBytesConfig(load_in_4bit=True, **four_bit, **more)


def saved_by_transformers(source: Path, folder: Path, quantization: Quantization, **more: Any) -> torch.nn.Module:
    """The 16-bit `source` as transformers alone quantizes it; saved into `folder`, with the tiny tokenizer."""
    config = bnb_config(quantization, **more)
    model = AutoModelForCausalLM.from_pretrained(str(source), quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def rename(folder: Path, new_name: Callable[[str], str]) -> list[str]:
    """Give every tensor of the one file another name; the names that changed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return [name for name in tensors if new_name(name) != name]


def check_same_weights(ours: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """Every packed weight, every constant and every 16-bit weight is bit for bit the same."""
    facts = ".quant_state."  # also hold the type of computation, which is ours
    state = {name: tensor for name, tensor in ours.state_dict().items() if facts not in name}
    assert state.keys() == {name for name in theirs if facts not in name}
    assert any(name.endswith((".absmax", ".SCB")) for name in state)
    for name, tensor in state.items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


@pytest.mark.parametrize("quantization", [Quantization("nf4"), NF4_SINGLE, INT8], ids=str)
@pytest.mark.parametrize("name", ["llama2", "bloom", "gpt_neox", "opt", "opt_350m", "phi3", "gemma3_text"])
def test_what_transformers_saves_of_a_quantized_model_is_read_as_it_is(name, quantization, tmp_path):
    """transformers gives GPT-NeoX's head its published name, `embed_out`, in every folder that it saves."""
    theirs = saved_by_transformers(published(name), tmp_path / "given", quantization)
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=quantization)
    check_same_weights(load_base(folder, device="cpu").model, theirs.state_dict())


@pytest.mark.parametrize("quantization", [Quantization("nf4"), NF4_SINGLE, INT8], ids=str)
@pytest.mark.parametrize("name", ["bloom", "gpt_neox", "opt_350m"])
def test_quantized_weights_with_published_names_are_those_with_the_models_own(name, quantization, tmp_path):
    theirs = saved_by_transformers(published(name), tmp_path / "given", quantization)
    changed = rename(tmp_path / "given", PUBLISHED[name].key)
    assert changed or name == "gpt_neox"  # whose head was saved under its published name
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=quantization)
    check_same_weights(load_base(folder, device="cpu").model, theirs.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(str(folder), device_map="cpu", local_files_only=True)
    check_same_weights(plain, theirs.state_dict())


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with its vision tower in 16 bits, as transformers saves it."""
    folder = tmp_path_factory.mktemp("multimodal")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(published_config("gemma3") | {"vision_config": SMALL_VISION}))
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", [Quantization("nf4"), INT8], ids=str)
def test_of_a_quantized_gemma_3_checkpoint_the_language_model_is_taken(quantization, multimodal, tmp_path):
    """Its vision tower is quantized too, and all its names begin with `language_model.`."""
    theirs = Gemma3ForConditionalGeneration.from_pretrained(
        str(multimodal),
        quantization_config=bnb_config(
            quantization, llm_int8_skip_modules=["lm_head", "model.language_model.layers.1"]
        ),
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "given")
    make_tokenizer().save_pretrained(tmp_path / "given")
    names = load_file(tmp_path / "given" / "model.safetensors").keys()
    part = "mlp.fc1.SCB" if quantization.kind == "int8" else "mlp.fc1.weight.absmax"
    assert any("vision_tower" in name and name.endswith(part) for name in names)
    assert any(name.startswith("language_model.model.layers.0.") for name in names)
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=quantization)
    assert json.loads((folder / "manifest.json").read_text())["num_vision"] == sum(
        name.startswith(("vision_tower.", "multi_modal_projector.")) for name in names
    )
    inside = "model.language_model."
    expected = {name.replace(inside, "model."): t for name, t in theirs.state_dict().items() if inside in name}
    expected["lm_head.weight"] = theirs.state_dict()["lm_head.weight"]
    ours = load_base(folder, device="cpu").model
    check_same_weights(ours, expected)
    assert type(ours.get_submodule("model.layers.1.mlp.up_proj")) is torch.nn.Linear  # it was left in 16 bits
    plain = AutoModelForCausalLM.from_pretrained(str(folder), device_map="cpu", local_files_only=True)
    check_same_weights(plain, expected)


@pytest.mark.parametrize("name", ["gpt_neox", "bloom"])
def test_a_folder_with_published_names_trains_and_has_a_proved_merge(name, tmp_path):
    saved_by_transformers(published(name), tmp_path / "given", NF4_SINGLE)
    rename(tmp_path / "given", PUBLISHED[name].key)
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=NF4_SINGLE)
    model = attach_adapter(load_base(folder, device="cpu").model, Lora(r=4, lora_alpha=8))
    move_factors(model, std=0.1)
    rows = random_rows([3, 5, 2])
    batches = split_batches(rows, 3)  # one example a row: BLOOM computes its attention itself
    assert all(gradient.norm() > 0 for gradient in gradients(model, batches).values())
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    result = merge(folder, tmp_path / "adapter", tmp_path / "merged", [rows.encoded(i) for i in range(3)])
    assert result.adapter_effect > 0.1 and result.arithmetic_ratio < 0.01


def test_weights_stored_in_the_type_that_sharded_training_needs_are_read(tmp_path):
    """`bnb_4bit_quant_storage: bfloat16`: four weights in each number of the file."""
    saved_by_transformers(published("llama3"), tmp_path / "given", NF4_SINGLE, bnb_4bit_quant_storage=torch.bfloat16)
    saved_by_transformers(published("llama3"), tmp_path / "bytes", NF4_SINGLE)
    name = "model.layers.1.mlp.down_proj"
    assert load_file(tmp_path / "given" / "model.safetensors")[f"{name}.weight"].dtype == torch.bfloat16
    found = []
    for given in ("given", "bytes"):
        folder = quantize_base(tmp_path / given, cache=tmp_path / "cache", quantization=NF4_SINGLE)
        layer = load_base(folder, device="cpu").model.get_submodule(name)
        values = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
        assert torch.equal(values, torch.cat(list(open_checkpoint(folder).row_blocks(f"{name}.weight"))))
        found.append(values)
    assert torch.equal(*found)


def test_files_are_linked_where_nothing_has_to_change_and_written_anew_where_names_do(tmp_path):
    for name, is_linked in (("opt", True), ("gpt_neox", False)):
        saved_by_transformers(published(name), tmp_path / name, NF4_SINGLE)
        folder = quantize_base(tmp_path / name, cache=tmp_path / "cache", quantization=NF4_SINGLE)
        assert (folder / "model.safetensors").samefile(tmp_path / name / "model.safetensors") is is_linked


def test_falcon_quantized_by_earlier_versions_of_transformers_is_read(tmp_path):
    """They quantized its layers, a subclass of nn.Linear, as all others; the names are the same."""
    given = tmp_path / "given"
    given.mkdir()
    for path in artefact("falcon_old").iterdir():
        if path.name != "manifest.json":
            (given / path.name).write_bytes(path.read_bytes())
    folder = quantize_base(given, cache=tmp_path / "cache")
    expected = load_base(artefact("falcon_old"), device="cpu").model.state_dict()
    check_same_weights(load_base(folder, device="cpu").model, expected)


def test_a_folder_that_only_says_that_it_is_quantized_is_refused_with_the_remedy(tmp_path):
    """What transformers 5 saves of a Falcon that it was asked to quantize."""
    saved_by_transformers(published("falcon_old"), tmp_path / "given", NF4_SINGLE)
    with pytest.raises(ModelError, match=r"says nf4, but no weight is quantized.*Remove quantization_config"):
        quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=NF4_SINGLE)
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "given" / "config.json").write_text(json.dumps(config))
    quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=NF4_SINGLE)


def test_weights_that_are_missing_or_have_no_place_are_named(tmp_path):
    saved_by_transformers(published("gpt_neox"), tmp_path / "given", NF4_SINGLE)
    rename(tmp_path / "given", lambda name: name.replace("layers.1.mlp.dense_h_to_4h.", "layers.7.mlp.dense_h_to_4h."))
    with pytest.raises(ModelError) as caught:
        quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=NF4_SINGLE)
    message = str(caught.value)
    assert "gpt_neox.layers.1.mlp.dense_h_to_4h.weight: not in the files" in message
    assert "gpt_neox.layers.7.mlp.dense_h_to_4h.weight: has no place in a gpt_neox model" in message


@pytest.mark.parametrize("quantization", [NF4_SINGLE, INT8], ids=str)
def test_a_quantized_weight_of_another_shape_is_refused_by_name(quantization, tmp_path):
    saved_by_transformers(published("llama3"), tmp_path / "given", quantization)
    swapped = {"q_proj": "k_proj", "k_proj": "q_proj"}  # 64 and 32 rows
    rename(tmp_path / "given", lambda name: ".".join(swapped.get(part, part) for part in name.split(".")))
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=quantization)
    with pytest.raises(
        ModelError, match=r"self_attn\.[qk]_proj\.weight: has shape \[\d+, 64\], the model's is \[\d+, 64\]"
    ):
        load_base(folder, device="cpu")
