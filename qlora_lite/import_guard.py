"""A guard around the import of bitsandbytes: it downloads and runs no foreign code, and imports no compiler.

On CPUs with AVX512-BF16 bitsandbytes uses the `kernels` package, *at import*, to fetch a native kernel from a hub and load it
(bitsandbytes 0.50, backends/cpu/ops.py), without asking. transformers and peft import bitsandbytes too, so the order of our own
imports cannot prevent it: `install` adds an import finder that hides `kernels` during any import of bitsandbytes. The guard can
go when bitsandbytes asks before it downloads.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType


def install() -> None:
    """Guard the next import of bitsandbytes; no-op if it is already imported."""
    if "bitsandbytes" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "bitsandbytes":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with _kernels_hidden(), _torch_compile_off():
            self._inner.exec_module(module)


@contextmanager
def _kernels_hidden() -> Iterator[None]:
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the unwanted download failed
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        sys.modules.update(hidden)


@contextmanager
def _torch_compile_off() -> Iterator[None]:
    """torch.compile returns functions as they are. bitsandbytes wraps its fallback kernels in it at import, which imports TorchInductor
    (0.8 s by `python -X importtime`). By its sources (0.50), neither CPUs nor CUDA cards run these: each has kernels of its own.
    """
    import torch

    compiler = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
