"""A frozen linear layer whose weight is stored in int8, with or without factors beside it."""

from typing import Any

import torch
from torch.nn.functional import linear

from qlora_lite.base.bnb import bitsandbytes, dequantized


class FrozenInt8(bitsandbytes.nn.Linear8bitLt):
    """An int8 layer alone. bitsandbytes' own forward rounds the inputs to int8 too; this computes as it does with an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the type of `x`; the weight is dequantized again for the backward pass, not kept."""
        return _FrozenProduct.apply(x, self)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: Any) -> torch.Tensor:
        ctx.base, ctx.dtype = base, x.dtype
        return linear(x, dequantized(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        return (grad_y @ dequantized(ctx.base, ctx.dtype) if ctx.needs_input_grad[0] else None), None
