"""bitsandbytes, with a workaround for its in-place repacking of weights. The only module that imports the package.

On CPUs with AVX512-BF16 `Linear4bit` repacks its weights *in place* at the first no-grad forward in eval mode. After that,
gradients are silently wrong, and `dequantize_4bit` and a merge return garbage. `keep_weights_unpacked` disables the repacking
on each layer (`support_avx512bf16_for_cpu`, an attribute that a test watches for upstream changes).
import_guard.py prevents its download at import.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import bitsandbytes
import torch

__all__ = [
    "bitsandbytes",
    "dequantized",
    "keep_weights_unpacked",
    "native_library",
    "quantization_constants",
    "runs_downloaded_kernel",
]


def keep_weights_unpacked(model: torch.nn.Module) -> int:
    """Disable the in-place repacking of 4-bit weights on every `Linear4bit` of `model`; return the number of layers."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def quantization_constants(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the scales and tables of every quantized layer of `model`."""
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state: Any = layer.weight.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            weight: Any = layer.weight
            yield weight.SCB if weight.SCB is not None else layer.state.SCB  # the first forward moves it


def dequantized(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [out, in] with which a frozen linear layer computes; int8 layers take the `dtype` of their input."""
    weight: Any = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scales_O: Any = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first forward moves it
        return (weight.data.float() * (scales_O[:, None] / 127)).to(dtype)
    plain: torch.Tensor = weight.detach()
    return plain


def native_library() -> tuple[str | None, str | None]:
    """-> (file of bitsandbytes' compiled code, None), or (None, the reason it is not loaded). Uses private names: no public ones exist."""
    library: Any = bitsandbytes.cextension.lib
    if isinstance(library, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary):
        return None, " ".join(str(library.error_msg).split())
    return str(library._lib._name), None


def runs_downloaded_kernel() -> bool:
    """Whether the download at import (import_guard.py) has happened; the name exists only on CPUs with AVX512-BF16."""
    ops: Any = import_module("bitsandbytes.backends.cpu.ops")
    return getattr(ops, "gemm_4bit_forward_kernel", None) is not None
