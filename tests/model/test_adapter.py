"""Where factors go, what they are made of, their fp32 gradients, and that plain peft reads what is saved."""

import json
import shutil
from math import sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.base.artefact import quantize_base
from qlora_lite.errors import ModelError
from qlora_lite.model.adapter import FactorLinear, Lora, attach_adapter, load_adapter, save_adapter
from qlora_lite.model.load import load_base
from tests.plain_peft import assert_plain_peft_computes_the_same
from tests.tiny_model import (
    NUM_LINEAR,
    SIZES,
    gradients,
    move_factors,
    random_rows,
    save_tiny_llama,
    split_batches,
    tiny_adapted,
    tiny_artefact,
    tiny_base,
)


def factors_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorLinear)}


def trainable_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model):
    with torch.no_grad():
        ids = torch.tensor([[5, 9, 77, 200, 31]])
        return model.eval()(ids, position_ids=torch.arange(5)[None], use_cache=False, lengths=(5,)).logits


def test_all_linear_layers_but_the_head_get_two_bf16_factors_and_nothing_else_trains():
    r = 4
    model = attach_adapter(tiny_base().model, Lora(r=r, lora_alpha=8))
    width, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 32
    shapes = [(width, width), (kv, width), (kv, width), (width, width)]  # q, k, v, o
    shapes += [(inner, width), (inner, width), (width, inner)]  # gate, up, down
    expected = SIZES["num_hidden_layers"] * sum(r * (rows + columns) for rows, columns in shapes)
    trainable = trainable_of(model)
    assert sum(parameter.numel() for parameter in trainable.values()) == expected
    assert len(trainable) == len(factors_of(model)) == 2 * NUM_LINEAR
    assert all(parameter.dtype == torch.bfloat16 and "lora_" in name for name, parameter in trainable.items())
    assert not any("lm_head" in name for name in trainable)


def test_a_new_adapter_changes_nothing_yet():
    base = tiny_base().model
    before = logits(base)
    assert torch.equal(logits(attach_adapter(base, Lora(r=4, lora_alpha=8))), before)


def test_target_modules_by_name_get_factors_and_no_others():
    model = attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    parents = {name.split(".lora_")[0].rpartition(".")[2] for name in factors_of(model)}
    assert parents == {"q_proj", "down_proj"} and len(factors_of(model)) == 2 * 2 * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("name", ["qproj", "norm", "_proj", "self_attn"])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_there_are(name):
    with pytest.raises(
        ModelError, match=rf'"{name}" is not a linear layer of this model.*; its linear layers: down_proj, .*v_proj'
    ):
        attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8, target_modules=["q_proj", name]))


def test_a_tied_head_is_no_target(tmp_path):
    folder = quantize_base(save_tiny_llama(tmp_path / "source", tie_word_embeddings=True), cache=tmp_path)
    with pytest.raises(
        ModelError, match=r"lora\.target_modules: this model ties lm_head to its embedding \(one weight\)"
    ):
        attach_adapter(
            load_base(folder, device="cpu").model, Lora(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
        )


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
)
def test_rows_of_new_tokens_and_the_whole_module_are_not_both_trained(settings):
    with pytest.raises(ModelError, match=r"data\.special_tokens: .* gets rows for new tokens"):
        attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8, **settings), new_token_ids=[310, 311])


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8 / 16), (True, 8 / sqrt(16))])
def test_scaling_is_alpha_over_r_or_over_its_root_with_rslora(use_rslora, scaling):
    model = attach_adapter(tiny_base().model, Lora(r=16, lora_alpha=8, use_rslora=use_rslora))
    found = {
        module.scaling["default"] for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)
    }
    assert found == {scaling}


def test_the_seed_decides_the_factors_and_disturbs_no_other_random_stream():
    def start(seed):
        torch.manual_seed(7)
        model = attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8), seed=seed)
        return torch.cat([p.detach().flatten() for p in trainable_of(model).values()]), torch.rand(1)

    (first, after), (again, _), (other, after_other) = start(0), start(0), start(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)
    tiny_base()
    assert torch.equal(after, torch.rand(1)) and torch.equal(after, after_other)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_gradients_are_fp32_whatever_the_factors_are_stored_in(factors):
    model = tiny_adapted(factors=factors)
    assert {parameter.dtype for parameter in trainable_of(model).values()} == {factors}
    found = gradients(model, split_batches(random_rows([3, 5]), 1))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_a_factors_gradient_is_the_product_in_fp32_and_not_rounded_to_bf16():
    factor = FactorLinear(32, 16, bias=False, dtype=torch.bfloat16)
    factor.weight.grad_dtype = torch.float32
    x = torch.randn(3, 40, 32, dtype=torch.bfloat16, requires_grad=True)
    grad_y = torch.randn(3, 40, 16, dtype=torch.bfloat16)
    y = factor(x)
    assert torch.equal(y, torch.nn.functional.linear(x, factor.weight))
    y.backward(grad_y)
    exact = torch.einsum("bto,bti->oi", grad_y.double(), x.detach().double())
    assert (factor.weight.grad.double() - exact).norm() < 1e-6 * exact.norm()
    assert torch.equal(x.grad, grad_y @ factor.weight)


def test_a_saved_adapter_gives_plain_peft_the_same_logits(tmp_path):
    ids = [5, 9, 77, 200, 31]
    assert_plain_peft_computes_the_same(tiny_adapted(), tiny_base().model, ids, base=tiny_artefact(), folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in tmp_path.iterdir())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_artefact())


def test_a_saved_adapter_is_loaded_as_it_was(tmp_path):
    model = tiny_adapted()
    save_adapter(model, tmp_path, base_name="tiny")
    loaded = load_adapter(tiny_base().model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert len(factors_of(loaded)) == 2 * NUM_LINEAR
    assert trainable_of(loaded) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(min(tensors)),
            r"1 factors are missing from the file, first base_model\.model\.model\.layers\.0",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.zeros(1)}),
            "1 factors are without a place in the model",
        ),
        (lambda tensors: tensors.update({min(tensors): torch.zeros(2, 2)}), "size mismatch"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, change, message):
    save_adapter(tiny_adapted(), tmp_path, base_name="tiny")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"(?s)not an adapter of this model \(.*{message}"):
        load_adapter(tiny_base().model, tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_adapter_folder_is_refused(tmp_path, name, content):
    save_adapter(tiny_adapted(), tmp_path / "good", base_name="tiny")
    folder = Path(shutil.copytree(tmp_path / "good", tmp_path / "bad"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match="not an adapter of this model"):
        load_adapter(tiny_base().model, folder)


def test_moved_factors_have_an_effect():
    model = attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8))
    before = logits(model)
    move_factors(model)
    assert not torch.equal(logits(model), before)
