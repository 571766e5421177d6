"""DoRA: the layer against its formula, peft's own layer and a merge; magnitudes that learn in fp32."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_lite.base.bnb import dequantized
from qlora_lite.merging import merge
from qlora_lite.merging.write import MergeOptions
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.dora import row_norms
from tests.plain_peft import assert_plain_peft_computes_the_same
from tests.tiny_model import gradients, move_factors, random_rows, split_batches, tiny_artefact, tiny_base

LAYER = "model.layers.1.mlp.down_proj"


def dora_model(*, compute: torch.dtype = torch.float32, moved: bool = True, **settings) -> PeftModel:
    model = attach_adapter(
        tiny_base(compute=compute).model, Lora(r=4, lora_alpha=8, use_dora=True), factor_dtype=compute, **settings
    )
    if moved:
        move_factors(model, std=0.2)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    return model


def dense(layer) -> torch.Tensor:
    """m * (W + s B A) / ||W + s B A||, as the paper writes it."""
    weight = dequantized(layer.get_base_layer(), torch.float32).float()
    change = layer.scaling["default"] * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    tuned = weight + change
    return layer.lora_magnitude_vector["default"].weight[:, None] * tuned / tuned.norm(dim=1, keepdim=True)


def test_the_layer_is_the_papers_formula():
    layer = dora_model().get_base_model().get_submodule(LAYER)
    x = torch.randn(5, 192)
    torch.testing.assert_close(layer(x), x @ dense(layer).T, rtol=1e-4, atol=1e-4)


def test_norms_from_thin_products_are_the_norms_of_the_dense_weight():
    weight, a, b = torch.randn(40, 64), torch.randn(4, 64), torch.randn(40, 4)
    torch.testing.assert_close(row_norms(weight.square().sum(1), weight @ a.T, a, b), (weight + b @ a).norm(dim=1))
    b[3] = -(weight[3] @ torch.linalg.pinv(a))  # a row that lies in A's span vanishes
    weight[3] = -b[3] @ a
    assert row_norms(weight.square().sum(1), weight @ a.T, a, b)[3] < 1e-2


def test_a_row_of_zeros_gives_zeros():
    model = dora_model(moved=False)
    layer = model.get_base_model().get_submodule(LAYER)
    packed = layer.get_base_layer().weight.data
    packed[: packed.shape[0] // 64] = 0x77  # NF4's code 7 is zero, in both halves of a byte: the first of 64 rows
    layer.dora.__init__(layer)
    layer.lora_magnitude_vector["default"].weight = layer.dora.first_magnitudes()
    y = layer(torch.randn(5, 192))
    assert torch.equal(y[:, 0], torch.zeros(5)) and torch.isfinite(y).all() and y[:, 1].abs().sum() > 0


def test_training_starts_at_the_base_model():
    model = dora_model(compute=torch.bfloat16, moved=False).eval()
    ids = torch.tensor([random_rows([3]).encoded(0).input_ids])
    model.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        tuned = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(tuned, base, rtol=0, atol=0.05)  # a factor of 1 is rounded to bf16 here and there


def test_magnitudes_are_fp32_and_every_part_has_a_gradient():
    model = dora_model(compute=torch.bfloat16)
    found = gradients(model, split_batches(random_rows([3, 5]), 1))
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {next(kind for kind in kinds if kind in name) for name in found} == kinds
    assert all(gradient.dtype == torch.float32 and gradient.norm() > 0 for gradient in found.values())
    assert {p.dtype for name, p in model.named_parameters() if "magnitude" in name} == {torch.float32}


def test_a_stretch_that_bf16_cannot_hold_still_shows_in_the_layers_output():
    """By 0.1%: bf16 values that are stretched so much are rounded back to themselves, all of them."""
    layer = dora_model(compute=torch.bfloat16, moved=False).get_base_model().get_submodule(LAYER)
    x = torch.randn(400, 192).bfloat16()
    with torch.no_grad():
        before = layer(x).float()
        layer.lora_magnitude_vector["default"].weight *= 1.001
        after = layer(x).float()
    assert torch.equal((before * 1.001).bfloat16().float(), before)
    share = (after * before).sum() / before.square().sum()
    assert share.item() == pytest.approx(1.001, abs=1e-4)


def test_gradients_are_those_of_the_formula_with_the_norm_held_constant():
    layer = dora_model().get_base_model().get_submodule(LAYER)
    x = torch.randn(5, 192)
    layer(x).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    found = [p.grad.clone() for p in (a, b, m)]
    for parameter in (a, b, m):
        parameter.grad = None
    weight = dequantized(layer.get_base_layer(), torch.float32).float()
    tuned = weight + layer.scaling["default"] * b @ a
    (x @ (m[:, None] * tuned / tuned.norm(dim=1, keepdim=True).detach()).T).square().sum().backward()
    for ours, parameter in zip(found, (a, b, m), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merge_is_the_adapter_model(scale, tmp_path):
    model = dora_model(compute=torch.bfloat16)
    save_adapter(model, tmp_path / "adapter", base_name="base")
    rows = random_rows([3, 5, 2])
    result = merge(
        tiny_artefact(),
        tmp_path / "adapter",
        tmp_path / "merged",
        [rows.encoded(i) for i in range(3)],
        options=MergeOptions(scale=scale),
    )
    assert result.adapter_effect > 1 and result.arithmetic_ratio < 0.01
    if scale == 1.0:
        layer = model.get_base_model().get_submodule(LAYER)
        merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{LAYER}.weight"].float()
        assert (merged - dense(layer)).norm() < 0.01 * dense(layer).norm()


def test_plain_peft_reads_it_and_computes_the_same(tmp_path):
    assert_plain_peft_computes_the_same(
        dora_model(compute=torch.bfloat16),
        tiny_base().model,
        random_rows([3]).encoded(0).input_ids,
        base=tiny_artefact(),
        folder=tmp_path,
        rtol=0.05,  # peft rounds the magnitudes to bf16
        atol=0.1,
    )
