"""A matrix product of 16-bit inputs with an fp32 result: no rounding to 16 bits."""

import torch

from qlora_lite.memory.ledger import card_of


def product_in_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [n, k] @ right [k, m] -> [n, m], summed and returned in fp32; CUDA does not widen the inputs."""
    if not card_of(left).is_cpu and left.dtype != torch.float32:
        if left.is_meta:
            return torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device="meta")
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
