"""Weights that are NaN or infinite: refused by name where they are read, before a loss that is NaN can be blamed on rows.

In: a tensor of a file and what it is called there. The look costs one pass over the tensor and no memory (its least and greatest value);
the values are counted only where one of these two is not finite.
"""

from pathlib import Path

import torch

from qlora_lite.errors import ModelError


class NotFiniteWeights(ModelError):
    """A tensor of a base or an adapter holds NaN or infinite values."""


def refuse_not_finite(
    tensor: torch.Tensor, name: str, *, where: Path | str, as_read: torch.Tensor | None = None
) -> None:
    """Raise NotFiniteWeights for a floating-point `tensor` that is not finite; `as_read` has the same values before they were rounded."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta or _is_finite(tensor):
        return
    if as_read is not None and _is_finite(as_read):
        largest, kind = float(as_read.abs().max()), str(tensor.dtype).removeprefix("torch.")
        raise NotFiniteWeights(
            f"{where}: {name} reaches {largest:.3g}, more than {kind} holds. Use --set model.dtype=fp32, or another copy of the model"
        )
    places = (~torch.isfinite(tensor)).nonzero()
    first = places[0].tolist()
    value = float(tensor[tuple(first)])
    raise NotFiniteWeights(
        f"{where}: {name} holds {len(places):,} of {tensor.numel():,} values that are not finite (first {value} at {first}), so nothing "
        "can be computed with it. The file is damaged, or what wrote it had diverged: use another copy"
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    least, greatest = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
