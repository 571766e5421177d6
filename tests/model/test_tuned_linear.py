"""A layer with its factors: the formula and its gradients, and that a change far below the 16-bit grid reaches the output."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from qlora_lite.base.bnb import dequantized
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.tuned_linear import TunedLinear
from tests.tiny_model import NUM_LINEAR, move_factors, set_dropout, tiny_adapted, tiny_base

LAYER = "model.layers.1.mlp.down_proj"  # 192 inputs, 64 outputs


def layer_of(model) -> TunedLinear:
    layer = model.get_base_model().get_submodule(LAYER)
    assert isinstance(layer, TunedLinear)
    return layer


def formula(layer, x: torch.Tensor) -> torch.Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return x @ (dequantized(layer.get_base_layer(), x.dtype) + layer.scaling["default"] * b @ a).T


def test_the_layer_and_its_gradients_are_the_formulas():
    layer = layer_of(tiny_adapted(compute=torch.float32, factors=torch.float32))
    x = torch.randn(2, 5, 192, requires_grad=True)
    parts = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    y, expected = layer(x), formula(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(y.square().sum(), parts)
    theirs = torch.autograd.grad(expected.square().sum(), parts)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_bias_is_added_once():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.proj = {"model_type": "none"}, torch.nn.Linear(8, 6)

    peft_layer = get_peft_model(Model(), LoraConfig(target_modules=["proj"], r=2)).base_model.model.proj
    layer = TunedLinear(peft_layer, None)
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), peft_layer(x))


def test_the_adapter_can_be_switched_off_and_starts_at_nothing():
    model = tiny_adapted(moved=False)
    layer, x = layer_of(model), torch.randn(7, 192).bfloat16()
    base = layer.get_base_layer()(x)
    torch.testing.assert_close(layer(x), base)
    move_factors(model)
    assert not torch.equal(layer(x), base)
    with model.disable_adapter():
        assert torch.equal(layer(x), base)


def test_dropout_acts_on_the_factors_input_only():
    model = tiny_adapted(compute=torch.float32, factors=torch.float32).train()
    set_dropout(model, 1.0)
    layer, x = layer_of(model), torch.randn(7, 192)
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), formula(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2**-11, 2**-13])
def test_a_change_below_the_grid_of_bf16_reaches_the_output_on_average(size):
    """As a share of what the formula adds: ours all of it, within noise; a sum after the rounding hardly any."""
    layer, x = layer_of(tiny_adapted()), torch.randn(20_000, 192).bfloat16()
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        base = layer.get_base_layer()(x)
        change = (b(a(x)) * layer.scaling["default"]).float()
        b.weight *= size * base.float().norm() / change.norm()
        change = (b(a(x)) * layer.scaling["default"]).float()
        unrounded = x.double() @ dequantized(layer.get_base_layer(), x.dtype).double().T

        def share(y: torch.Tensor) -> float:
            return float(((y.double() - unrounded) * change).sum() / change.double().square().sum())

        assert share(layer(x)) == pytest.approx(1.0, abs=0.1)
        assert share(base + (b(a(x)) * layer.scaling["default"])) < 0.6


def test_every_layer_with_factors_is_ours():
    model = attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8))
    wrapped = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(wrapped) == NUM_LINEAR and all(isinstance(module, TunedLinear) for module in wrapped)
