"""A frozen linear layer with an int8 weight, with or without factors."""

from typing import Any

import torch
from torch.nn.functional import linear

from qlora_lite.base.bnb import bitsandbytes, dequantized


class FrozenInt8(bitsandbytes.nn.Linear8bitLt):
    """An int8 layer without an adapter. bitsandbytes' forward also rounds the inputs to int8; this one computes as with an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the type of `x`; the backward pass dequantizes the weight again."""
        return _FrozenProduct.apply(x, self)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: Any) -> torch.Tensor:
        ctx.base, ctx.dtype = base, x.dtype
        return linear(x, dequantized(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        return (grad_y @ dequantized(ctx.base, ctx.dtype) if ctx.needs_input_grad[0] else None), None
