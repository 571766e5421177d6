"""A frozen linear layer with its factors: one matrix product, rounded once.

    y = [x | h] [W | B]^T + bias        h = scaling * A dropout(x)

Matrix products are summed in fp32 and rounded to 16 bits at the end. peft's layer rounds W x first, and adds the change to a value that
is already on the 16-bit grid: a change below half a grid step (2^-9 of the value in bf16) is lost, in every step. Early in training that
is most of the change. Here the change enters the sum before the only rounding, so it survives on average, as in the merged model;
tests/model/test_tuned_linear.py shows both. DoRA's row scales (dora.py) act before the rounding too, for the same reason.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear, pad

from qlora_lite.base.bnb import dequantized
from qlora_lite.model.dora import Dora
from qlora_lite.model.products import product_in_fp32


class TunedLinear(torch.nn.Module, LoraLayer):
    """peft's layer with the same parameters, names and switches, and our forward pass."""

    def __init__(self, layer: LoraLayer, dora: Dora | None) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.dora = dora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the type of `x`. Dropout acts on the input of A only."""
        layer: Any = self  # peft's classes are only partly typed
        base = layer.get_base_layer()
        if self.disable_adapters:
            alone: torch.Tensor = base(x)
            return alone
        assert self.active_adapters == ["default"], "one adapter, of peft's default name"
        a, b, dropout = (parts["default"] for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout))
        hidden = a(dropout(x.to(a.weight.dtype))) * layer.scaling["default"]
        if layer.dora is None:
            return _OneProduct.apply(x, hidden, b.weight, base, False)
        stretched = layer.dora.stretch(layer) * _OneProduct.apply(x, hidden, b.weight, base, True)
        return (stretched if base.bias is None else stretched + base.bias).to(x.dtype)


class _OneProduct(torch.autograd.Function):
    """x W^T + h B^T: in fp32 without bias, or rounded with bias. The backward pass dequantizes W again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, hidden: torch.Tensor, b_OR: torch.Tensor, base: Any, in_fp32: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, b_OR)
        ctx.base, ctx.dtype = base, x.dtype
        weight_OI = dequantized(base, x.dtype)
        unaligned = (0, -hidden.shape[-1] % 8)  # zeros that align rows for tensor cores
        wide = torch.cat([weight_OI, pad(b_OR.to(weight_OI.dtype), unaligned)], dim=1)
        joined = torch.cat([x.to(wide.dtype), pad(hidden.to(wide.dtype), unaligned)], dim=-1)
        if in_fp32:
            return product_in_fp32(joined.flatten(0, -2), wide.T).unflatten(0, x.shape[:-1])
        return linear(joined, wide, None if base.bias is None else base.bias.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, b_OR = ctx.saved_tensors
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            weight_OI = dequantized(ctx.base, ctx.dtype)
            grad_x = (grad_y.to(weight_OI.dtype) @ weight_OI).to(ctx.dtype)
        grad_y = grad_y.to(hidden.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = product_in_fp32(grad_y.flatten(0, -2).T, hidden.flatten(0, -2))
        return grad_x, grad_y @ b_OR.to(grad_y.dtype), grad_b, None, None
