"""bitsandbytes, imported and set up so that it neither calls the network nor changes weights behind our back.

Two traps are closed here, and this is the only module that imports the package:

1. On CPUs with AVX512-BF16 bitsandbytes asks the `kernels` package, *at import*, to download and run a native kernel from a
   hub (bitsandbytes 0.50, backends/cpu/ops.py). Nobody asked for that, so `kernels` is out of reach while it is imported.
2. On the same CPUs `Linear4bit` repacks its weights *in place* at the first no-grad forward in eval mode. From then on
   gradients are silently wrong, `dequantize_4bit` returns garbage and so does a merge. `keep_weights_unpacked` switches
   that off on each layer (`support_avx512bf16_for_cpu`, an attribute that a test watches for upstream changes).
"""

import importlib
import logging
import sys
from types import ModuleType

import torch


def _import_without_kernels() -> ModuleType:
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the download it was not asked for has failed
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        sys.modules.update(hidden)


bitsandbytes = _import_without_kernels()


def keep_weights_unpacked(model: torch.nn.Module) -> int:
    """Forbid the in-place repacking of 4-bit weights on every `Linear4bit` of `model`; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
