"""DoRA (arXiv 2402.09353): a weight's direction is tuned by LoRA and the length of each of its rows by one number.

    W' = m * (W + s B A) / ||W + s B A||        m [out] starts at ||W||, norms are over rows

As in the paper (section 4.3) the norm counts as a constant in the backward pass. peft's layer forms the dense product B A in
every forward; here the norm comes from thin products, of which only W A^T touches the weight:

    ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T

`row_norms` is this formula: training and merging (merge/lora.py) both use it. Magnitudes are fp32: they lie near the norms of
whole rows, and a step of training is far below the 8 bits of bf16. For the same reason the product W x is made anew in fp32, and
stretched before it is rounded: stretching bf16 values by less than 0.2% gives the same bf16 values, so training would not see
what the merged model does. That is a second product beside the one that peft has made already.
"""

from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant

from qlora_lite.model.bnb import bitsandbytes
from qlora_lite.model.products import product_in_fp32


def row_norms(square_O: torch.Tensor, cross_OR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """||W + B A|| of each row, [out] in fp32; `square_O` is ||W||^2 and `cross_OR` is W A^T, B already scaled."""
    a_RI, b_OR = a_RI.float(), b_OR.float()
    squares_O = square_O + 2 * (cross_OR.float() * b_OR).sum(1) + ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
    return squares_O.clamp_min(0).sqrt()  # rounding may leave a row that vanished below zero


class Dora(DoraLinearVariant):
    """What peft calls for a DoRA layer; one instance a layer."""

    def __init__(self, layer: Any) -> None:
        weight_OI = dequantized(layer.get_base_layer()).float()
        self._square_O = weight_OI.square().sum(1)

    def first_magnitudes(self) -> torch.nn.Parameter:
        """||W|| of each row: with B = 0 the layer is the base's."""
        return torch.nn.Parameter(self._square_O.sqrt())

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """y = m / ||W + s B A|| * (W x + s B A x) + bias, rounded once; `result` gives the type. Dropout acts on A's input only."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, base = module.scaling[active_adapter], module.get_base_layer()
        with torch.no_grad():
            weight_OI = dequantized(base)
            cross_OR = weight_OI @ a.weight.T.to(weight_OI.dtype)
            norm_O = row_norms(self._square_O.to(x.device), cross_OR, a.weight, scaling * b.weight.float())
        share_O = module.lora_magnitude_vector[active_adapter].weight / norm_O
        change = b(a(module.lora_dropout[active_adapter](x))).float() * scaling
        tuned = share_O * (_FrozenProduct.apply(x, base) + change)
        return (tuned if base.bias is None else tuned + base.bias).to(result.dtype)


class _FrozenProduct(torch.autograd.Function):
    """x @ W.T in fp32 for a frozen layer, whose weight is dequantized again for the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        weight_OI = dequantized(layer)
        return product_in_fp32(x.reshape(-1, x.shape[-1]).to(weight_OI.dtype), weight_OI.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        weight_OI = dequantized(ctx.layer)
        return (grad_y.to(weight_OI.dtype) @ weight_OI).to(ctx.dtype), None


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """The weight [out, in] that a frozen linear layer computes with."""
    weight: Any = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales_O: Any = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first forward moves it
        return (weight.data.float() * (scales_O[:, None] / 127)).bfloat16()
    plain: torch.Tensor = weight.detach()
    return plain
