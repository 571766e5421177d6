"""The one table of number types: storage, compute, gradients and updates, by device.

    device                     base compute  factors  gradients  update          loss scaling
    CPU that multiplies bf16   bf16          bf16     fp32       fp32 master     no
    other CPUs                 fp32          fp32     fp32       fp32            no
    CUDA, SM 8.0 or newer      bf16          bf16     fp32       fp32 master     no
    CUDA, older (Turing)       fp16          fp32     fp32       fp32            yes: fp16 gradients underflow below 6e-8
    asked for fp32             fp32          fp32     fp32       fp32            no

The frozen weights are NF4 in every line; "base compute" is the type to which they are dequantized. A CPU without bf16 instructions also
computes in bf16 if asked to: with less memory than fp32, and a conversion for every product.
"""

from dataclasses import dataclass

import torch

from qlora_lite.device.accelerator import cpu_multiplies_bf16
from qlora_lite.device.card import Card
from qlora_lite.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their words in a recipe


@dataclass(frozen=True)
class NumberTypes:
    """One line of the table, with the reason for its choice."""

    compute: torch.dtype
    factors: torch.dtype
    scale_loss: bool
    reason: str  # why the compute type is this one

    @property
    def name(self) -> str:
        """The compute type as in a recipe: `bf16`, `fp16` or `fp32`."""
        return word_of(self.compute)


def choose_types(asked: str, card: Card) -> NumberTypes:
    """`auto | bf16 | fp16 | fp32` -> the line of the table for `card`. Raises UserError for a type that the card lacks."""
    name = "CPU" if card.is_cpu else f"card ({card.in_words})"
    if asked == "auto" and card.is_cpu and not cpu_multiplies_bf16():
        asked, reason = "fp32", "the CPU has no instructions that multiply bf16"
    elif asked == "auto":
        asked = "bf16" if card.has_bf16 else "fp16"
        reason = f"the {name} {'computes in' if card.has_bf16 else 'has no'} bf16"
    else:
        reason = "asked for"
    if asked == "fp16" and card.is_cpu:
        raise UserError(
            "model.dtype: fp16 is for cards without bf16; CPUs compute in bf16. Use model.dtype: auto, bf16 or fp32"
        )
    if asked == "bf16" and not card.has_bf16:
        raise UserError(f"model.dtype: the {name} has no bf16. Use model.dtype: auto, fp16 or fp32")
    return _computed_in(asked, reason)


def types_of_run(name: str) -> NumberTypes:
    """The line of the table that a run was trained with, on any machine, so that a merge does not depend on the machine."""
    return _computed_in(name, "as the run was trained")


def _computed_in(name: str, reason: str) -> NumberTypes:
    factors = torch.bfloat16 if name == "bf16" else torch.float32
    return NumberTypes(DTYPES[name], factors, scale_loss=name == "fp16", reason=reason)


def word_of(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32` of torch's type."""
    return next(word for word, known in DTYPES.items() if known is dtype)
