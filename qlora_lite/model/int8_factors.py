"""LoRA factors in 8 bits, half the size of 16-bit ones: fp32 factors -> int8 tensors with their steps -> fp32 factors.

    value = step * q        q a whole number from -127 to 127, step = max |value| / 127 of 64 values in a row (fp32)

A [R, in] is cut along its rows and B [out, R] along its columns, so the values of a block belong to one direction of the change. The
error is 0.6% (root mean square) for a block of normally distributed values, and 0.8% for a change B A of two such factors.

On disk, `NAME` (int8, of the factor's shape) has `NAME.step` [R, blocks] beside it. The file's name differs from PEFT's: plain peft,
which ignores steps, would read wrong values; this way it reports a missing adapter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora_lite.files.library_names import B_FACTOR

INT8_FILE = "adapter_model.int8.safetensors"
_STEP = ".step"
_BLOCK = 64


def to_int8(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA factors by PEFT's names, finite and of any floating type -> int8 tensors and their steps."""
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        rows_RN = _by_direction(name, factor.float())
        step_RK = _blocks(rows_RN).abs().amax(-1) / 127
        step_RN = _spread(step_RK, rows_RN.shape[1])
        q_RN = (rows_RN / torch.where(step_RN > 0, step_RN, 1.0)).round().to(torch.int8)
        tensors[name], tensors[name + _STEP] = _by_direction(name, q_RN).contiguous(), step_RK
    return tensors


def from_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fp32 factors. Raises ValueError for a tensor without steps, or with steps of a wrong shape or type."""
    factors: dict[str, Tensor] = {}
    for name in tensors:
        if name.endswith(_STEP) and name.removesuffix(_STEP) in tensors:
            continue
        q, step_RK = tensors[name], tensors.get(name + _STEP)
        if q.dtype != torch.int8 or q.dim() != 2 or step_RK is None:
            raise ValueError(f"{name}: expected an int8 matrix and its steps")
        q_RN = _by_direction(name, q)
        expected = (q_RN.shape[0], -(-q_RN.shape[1] // _BLOCK))
        if step_RK.dtype != torch.float32 or tuple(step_RK.shape) != expected or not step_RK.isfinite().all():
            raise ValueError(f"{name}{_STEP}: expected {list(expected)} finite fp32 steps")
        factors[name] = _by_direction(name, q_RN * _spread(step_RK, q_RN.shape[1])).contiguous()
    return factors


def _by_direction(name: str, factor: Tensor) -> Tensor:
    """A as [R, in], B as [R, out]; its own inverse."""
    return factor.T if name.endswith(f"{B_FACTOR}weight") else factor


def _blocks(rows_RN: Tensor) -> Tensor:
    """[R, N] -> [R, blocks, 64], the last block padded with zeros."""
    padded = torch.nn.functional.pad(rows_RN, (0, -rows_RN.shape[1] % _BLOCK))
    return padded.view(rows_RN.shape[0], -1, _BLOCK)


def _spread(step_RK: Tensor, width: int) -> Tensor:
    """[R, blocks] -> a step for each value, [R, width]."""
    return step_RK.repeat_interleave(_BLOCK, dim=1)[:, :width]
