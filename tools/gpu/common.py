"""What the items of tools/gpu_check share: the device that they make tensors on, parts of an item, seconds, a relative distance."""

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from qlora_lite.device import accelerator
from qlora_lite.device.accelerator import synchronize, torch_module

Found = dict[str, Any]


def device() -> str:
    return accelerator.ACCELERATOR


def each(parts: dict[str, Callable[[], Any]]) -> Found:
    """All of `parts`, whatever one of them raises; "wrong" names those that do not hold."""
    found: Found = {"wrong": []}
    for name, work in parts.items():
        try:
            found[name] = work()
            found["wrong"] += [f"{name}: {each}" for each in _wrong_of(found[name])]
        except Exception as error:  # the others may still tell something
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1500]}
            found["wrong"].append(f"{name}: {type(error).__name__}")
        gc.collect()
        with contextlib.suppress(Exception):
            torch_module().empty_cache()
    return found


def _wrong_of(part: Any) -> list[str]:
    """The cases of a part that it found wrong itself."""
    cases = part if isinstance(part, list) else [part]
    return [str(case["wrong"]) for case in cases if isinstance(case, dict) and case.get("wrong")]


def timed(work: Callable[[], object]) -> float:
    synchronize(device())
    begin = time.perf_counter()
    work()
    synchronize(device())
    return time.perf_counter() - begin


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.detach().cpu().double() - exact.double()).norm() / exact.double().norm()).item()
