"""DoRA (arXiv 2402.09353): a weight's direction is tuned by LoRA and the length of each of its rows by one number.

    W' = m * (W + s B A) / ||W + s B A||        m [out] starts at ||W||, norms are over rows

As in the paper (section 4.3) the norm counts as a constant in the backward pass. peft's layer forms the dense product B A in
every forward; here the norm comes from thin products, of which only W A^T touches the weight:

    ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T

`row_norms` is this formula: training and merging (merging/lora.py) both use it. Magnitudes are fp32: they lie near the norms of
whole rows, and a step of training is far below the 8 bits of bf16. For the same reason a layer's output is stretched before it is
rounded (tuned_linear.py): stretching bf16 values by less than 0.2% gives the same bf16 values, so training would not see what
the merged model does.
"""

from typing import Any

import torch

from qlora_lite.base.bnb import dequantized


def row_norms(square_O: torch.Tensor, cross_OR: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """||W + B A|| of each row, [out] in fp32; `square_O` is ||W||^2 and `cross_OR` is W A^T, B already scaled."""
    a_RI, b_OR = a_RI.float(), b_OR.float()
    squares_O = square_O + 2 * (cross_OR.float() * b_OR).sum(1) + ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
    smallest = torch.finfo(
        torch.float32
    ).tiny  # of a row that vanished rounding may leave less than zero; m / 0 is no number
    return squares_O.clamp_min(smallest).sqrt()


class Dora:
    """The stretch of one layer."""

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
