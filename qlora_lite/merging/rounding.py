"""Store fp32 values in 16 bits without losing small changes: unbiased, seeded, stochastic rounding.

The dequantized base is on the bf16 grid (8 significant bits), so nearest rounding always loses a change smaller than half a grid step.
Stochastic rounding chooses the upper neighbour with probability (value - lower) / step, so the stored value is right in expectation, and
errors average out over a dot product.

Random bits come from PCG64 (numpy guarantees that its raw stream does not change between versions), seeded by the seed and the tensor's
name, and drawn in row order: the same tensor gives the same bytes, for any cut into blocks and shards.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

ROUNDINGS = ("stochastic", "nearest")


def make_rounder(name: str, *, dtype: torch.dtype, rounding: str, seed: int) -> Callable[[Tensor], Tensor]:
    """-> a function that rounds the fp32 blocks of tensor `name`; call it in row order. It may change its argument.

    All blocks but the last must have a multiple of 4 values (four draws of 16 bits are one word of the generator).
    """
    if dtype == torch.float32:
        return lambda block: block
    if rounding == "nearest":
        return lambda block: block.to(dtype)
    assert rounding == "stochastic", rounding
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.PCG64(int.from_bytes(digest[:16], "little"))
    to_dtype = _stochastic_bf16 if dtype == torch.bfloat16 else _stochastic_fp16
    return lambda block: to_dtype(block, _random_16_bits(generator, block))


def _random_16_bits(generator: np.random.PCG64, block: Tensor) -> Tensor:
    """Random int32 in [0, 65536), in the shape of `block`."""
    if block.is_meta:  # a plan: tensors of the same sizes, without values
        drawn = torch.empty((block.numel() + 3) // 4, dtype=torch.int64, device="meta")
        return drawn.view(torch.int16)[: block.numel()].to(torch.int32).view(block.shape)
    words = generator.random_raw((block.numel() + 3) // 4)
    bits = words.astype("<u8", copy=False).view("<u2")[: block.numel()].astype(np.int32)
    return torch.from_numpy(bits).view(block.shape)


def _stochastic_bf16(block: Tensor, random_16: Tensor) -> Tensor:
    """bf16 is the upper half of fp32: add noise to the lower half and cut it off. Infinity and NaN stay."""
    finite = torch.isfinite(block)
    bits = block.view(torch.int32).add(random_16)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded if bool(finite.all()) else torch.where(finite, rounded, block.to(torch.bfloat16))


def _stochastic_fp16(block: Tensor, random_16: Tensor) -> Tensor:
    """fp16 steps are 2^(e-11) for values in [2^(e-1), 2^e), and 2^-24 below 2^-14."""
    _, exponent = torch.frexp(block)
    exponent = (exponent - 11).clamp_(min=-24)
    chance = (random_16 >> 3).float().div_(2**13)  # 13 bits, the extra bits of fp32: the sum is exact
    steps = torch.ldexp(block.abs(), -exponent)
    rounded = torch.ldexp((steps + chance).floor_(), exponent).copysign_(block)
    return torch.where(torch.isfinite(block), rounded, block).to(torch.float16)
