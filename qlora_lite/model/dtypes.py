"""The one table of number types: what is stored, computed, differentiated and updated in which type, per device.

    device                 base compute  factors  gradients  update          loss scaling
    CPU                    bf16          bf16     fp32       fp32 master     no
    CUDA, SM 8.0 or newer  bf16          bf16     fp32       fp32 master     no
    CUDA, older (Turing)   fp16          fp32     fp32       fp32            yes: fp16 gradients underflow below 6e-8
    asked for fp32         fp32          fp32     fp32       fp32            no

The frozen weights are NF4 in every row; "base compute" is what they are dequantized to.
"""

from dataclasses import dataclass

import torch

from qlora_lite.errors import UserError

BY_NAME = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class NumberTypes:
    """One row of the table, with the reason it was chosen."""

    compute: torch.dtype
    factors: torch.dtype
    scale_loss: bool
    reason: str

    @property
    def name(self) -> str:
        """`bf16`, `fp16` or `fp32`: the compute type as a recipe spells it."""
        return next(name for name, dtype in BY_NAME.items() if dtype is self.compute)


def choose_device(asked: str) -> tuple[str, str]:
    """`auto | cpu | cuda` -> (device, reason). Raises UserError for cuda where there is none."""
    if asked == "cpu":
        return "cpu", "cpu: asked for"
    if torch.cuda.is_available():
        return "cuda", f"cuda: {torch.cuda.get_device_name()}" if asked == "auto" else "cuda: asked for"
    if asked == "cuda":
        raise UserError("device: cuda was asked for, and torch finds no CUDA device. Use device: cpu or auto")
    return "cpu", "cpu: torch finds no CUDA device"


def planned_types(asked: str) -> NumberTypes:
    """The row for a card that is not here: bf16 unless the recipe says otherwise."""
    if asked in ("auto", "bf16"):
        return NumberTypes(
            torch.bfloat16, torch.bfloat16, scale_loss=False, reason="bf16: cards since 2020 compute in it"
        )
    return NumberTypes(BY_NAME[asked], torch.float32, scale_loss=asked == "fp16", reason=f"{asked}: asked for")


def choose_types(asked: str, device: str) -> NumberTypes:
    """`auto | bf16 | fp16 | fp32` -> the row of the table for `device`. Raises UserError for a type the device lacks."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        has_bf16, name = major >= 8, f"card (SM {major}.{minor})"
    else:
        has_bf16, name = True, "CPU"
    if asked == "auto":
        asked = "bf16" if has_bf16 else "fp16"
        reason = f"{asked}: the {name} {'computes in' if has_bf16 else 'has no'} bf16"
    else:
        reason = f"{asked}: asked for"
    if asked == "fp16" and device == "cpu":
        raise UserError(
            "model.dtype: fp16 is for cards without bf16; CPUs compute in bf16. Use model.dtype: auto, bf16 or fp32"
        )
    if asked == "bf16":
        if not has_bf16:
            raise UserError(f"model.dtype: the {name} has no bf16. Use model.dtype: auto, fp16 or fp32")
        return NumberTypes(torch.bfloat16, torch.bfloat16, scale_loss=False, reason=reason)
    return NumberTypes(BY_NAME[asked], torch.float32, scale_loss=asked == "fp16", reason=reason)
