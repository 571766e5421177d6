"""Refusal, by name, of NaN and infinite weights when they are read, before a NaN loss can be blamed on rows.

In: a tensor of a file and its name there. The check costs one pass over the tensor and no memory (its minimum and maximum);
values are counted only if one of these is not finite.
"""

from pathlib import Path

import torch

from qlora_lite.errors import ModelError


class NotFiniteWeights(ModelError):
    """A tensor of a base or adapter with NaN or infinite values."""


def refuse_not_finite(
    tensor: torch.Tensor, name: str, *, where: Path | str, as_read: torch.Tensor | None = None
) -> None:
    """Raise NotFiniteWeights for a floating-point `tensor` that is not finite; `as_read` has the values before rounding."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta or _is_finite(tensor):
        return
    if as_read is not None and _is_finite(as_read):
        largest, kind = float(as_read.abs().max()), str(tensor.dtype).removeprefix("torch.")
        raise NotFiniteWeights(
            f"{where}: {name} reaches {largest:.3g}, beyond the range of {kind}. Use --set model.dtype=fp32, or another copy of the model"
        )
    places = (~torch.isfinite(tensor)).nonzero()
    first = places[0].tolist()
    value = float(tensor[tuple(first)])
    raise NotFiniteWeights(
        f"{where}: {name} has {len(places):,} of {tensor.numel():,} values that are not finite (first {value} at {first}). The file is "
        "damaged, or its training diverged: use another copy"
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    least, greatest = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
