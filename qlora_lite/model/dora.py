"""DoRA (arXiv 2402.09353): LoRA tunes the direction of a weight, and one parameter per row tunes the row's length.

    W' = m * (W + s B A) / ||W + s B A||        m [out] starts at ||W||, norms are over rows

As in the paper (section 4.3), the backward pass treats the norm as a constant. peft's layer forms the dense product B A in every
forward pass; here the norm comes from thin products, of which only W A^T reads the weight:

    ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T

`row_norms` is this formula, for training and for merging (merging/lora.py). Magnitudes are fp32: they are close to the norms of whole
rows, and a training step changes them by far less than the 8 bits of bf16 can show. For the same reason a layer's output is scaled
before it is rounded (tuned_linear.py): scaling bf16 values by less than 0.2% gives the same bf16 values, so training would compute
something else than the merged model.
"""

from typing import Any

import torch

from qlora_lite.base.bnb import dequantized


def row_norms(square_O: torch.Tensor, cross_OR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """||W + B A|| of each row, [out] in fp32; `square_O` is ||W||^2 and `cross_OR` is W A^T, B already scaled."""
    a_RI, b_OR = a_RI.float(), b_OR.float()
    squares_O = square_O + 2 * (cross_OR.float() * b_OR).sum(1) + ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
    smallest = torch.finfo(torch.float32).tiny  # rounding may leave a vanished row below zero, and m / 0 is not finite
    return squares_O.clamp_min(smallest).sqrt()


class Dora:
    """The row scales of one layer."""

    def __init__(self, layer: Any) -> None:
        weight_OI = dequantized(layer.get_base_layer(), torch.float32).float()
        self._square_O = weight_OI.square().sum(1)

    def first_magnitudes(self) -> torch.nn.Parameter:
        """||W|| of each row: with B = 0 the layer is the base's."""
        return torch.nn.Parameter(self._square_O.sqrt())

    def stretch(self, layer: Any) -> torch.Tensor:
        """m / ||W + s B A||, [out] in fp32, as `layer` is now; the norm counts as a constant."""
        a, b, scaling = (parts["default"] for parts in (layer.lora_A, layer.lora_B, layer.scaling))
        with torch.no_grad():
            weight_OI = dequantized(layer.get_base_layer(), a.weight.dtype)
            cross_OR = weight_OI @ a.weight.T.to(weight_OI.dtype)
            norm_O = row_norms(self._square_O.to(weight_OI.device), cross_OR, a.weight, scaling * b.weight.float())
        stretch_O: torch.Tensor = layer.lora_magnitude_vector["default"].weight / norm_O
        return stretch_O
