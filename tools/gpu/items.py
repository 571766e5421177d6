"""The items of tools/gpu_check: each a function that returns the values it saw, and names under "wrong" those that do not hold.

    1 versions       what is installed, and how torch's libraries are set          6 gradients   card against CPU, trees, splits
    2 operators      against fp64, and against the CPU to the bit                  7 peaks       an 8B shape against its plan
    3 run            a tiny run through the command line, stopped and resumed      8 speed       where a step's time goes
    4 settings       the same with dropout, DoRA, int8, fp16, fp32                 9 shapes      thirty new lengths through attention
    5 memory         the allocator refuses: the leaner retry                      10 paged       managed memory, last: it may hang a driver

Every item makes its own tensors on `device()` (common.py): the card, or the tests' stand-in for one.
"""

import contextlib
import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import qlora_lite  # noqa: F401  (guards the import of bitsandbytes)
from gpu.common import Found, device
from gpu.gradients import gradients
from gpu.operators import operators
from gpu.peaks import peaks
from gpu.runs import memory, settings, whole_run
from gpu.speed import paged, shapes, speed
from qlora_lite.base.bnb import native_library
from qlora_lite.commands.overheads import cublas_workspace_bytes
from qlora_lite.device.accelerator import card_here, torch_module
from qlora_lite.device.numerics import exact_sums


@dataclass(frozen=True)
class Item:
    """One check."""

    number: int
    name: str
    work: Callable[[], Found]
    on_stand_in: bool = False


@contextlib.contextmanager
def on_device(*, stand_in: bool) -> Iterator[None]:
    """The card, or the tests' stand-in for one."""
    if not stand_in:
        yield
        return
    from tests import standin

    with standin.card("rtx-4090"):
        yield


def chosen(only: Sequence[int] | None, *, stand_in: bool) -> list[Item]:
    """In order; on the stand-in those that it can show."""
    return [item for item in ITEMS if (only is None or item.number in only) and (item.on_stand_in or not stand_in)]


def run(item: Item) -> Found:
    """What it saw, or why it does not hold; never raises."""
    begin = time.perf_counter()
    found: Found = {"item": item.number, "name": item.name, "ok": True}
    try:
        found["found"] = item.work()
        found["ok"] = not found["found"].get("wrong")
    except Exception as error:  # each item stands alone
        found |= {
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:2000],
            "where": traceback.format_exc()[-3000:],
        }
    gc.collect()
    with contextlib.suppress(Exception):
        torch_module().empty_cache()
    return found | {"elapsed_s": round(time.perf_counter() - begin, 2)}


def versions() -> Found:
    """Versions, the native library, the card, and how torch's libraries are set before and inside our own context."""
    card, products = card_here(), torch.backends.cuda.matmul
    assert card is not None
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "triton", "numpy")
    installed = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    with exact_sums():
        inside = {
            "allow_bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
            "allow_fp16_reduced_precision_reduction": products.allow_fp16_reduced_precision_reduction,
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    assert not any(inside.values()), inside
    library, error = native_library()
    assert library is not None and "_cpu" not in library, (
        f"bitsandbytes' library for this card is not loaded: {error or library}"
    )
    return {
        "versions": installed,
        "cuda": torch.version.cuda,
        "card": vars(card) | {"capability": list(card.capability or ())},
        "known": "assumed" not in card.source,
        "native_library": Path(library).name,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "backends_outside": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "allow_bf16_reduced_precision_reduction": products.allow_bf16_reduced_precision_reduction,
        },
        "inside": inside,
        "cublas_workspace_bytes": cublas_workspace_bytes(device()),
        "planned_cublas_workspace_bytes": card.cublas_workspace_bytes,
        "free_bytes": torch_module().mem_get_info()[0],
    }


ITEMS = (
    Item(1, "versions", versions),
    Item(2, "operators", operators, on_stand_in=True),
    Item(3, "run", whole_run, on_stand_in=True),
    Item(4, "settings", settings, on_stand_in=True),
    Item(5, "memory", memory),
    Item(6, "gradients", gradients, on_stand_in=True),
    Item(7, "peaks", peaks),
    Item(8, "speed", speed),
    Item(9, "shapes", shapes),
    Item(10, "paged", paged),
)
