"""qlora_lite: fine-tune a causal language model in little memory, and prove the merge.

    from qlora_lite import load_recipe, make_plan, load_model, train, evaluate, merge

Names are loaded when first used, so that a misspelt recipe or `--help` does not wait for torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora_lite import import_guard
from qlora_lite.device.waiting import choose_spinning

# What the user says about connections, before we say it for the libraries: with it, `fetch` opens none either.
OFFLINE_ASKED = any(
    os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
)
# Nothing of this package opens a connection unless asked to fetch; the libraries below are told the same.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# torch's CPU allocator on huge pages: with give_back_free_memory (memory/measuring.py) 985 instead of 1,490 MiB resident
# after the first step of the default recipe, at about equal speed. Read when torch allocates for the first time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# oneDNN and ideep keep the code and the operands of bf16 products by their shape, 1,024 of each by default. No two packed rows have the
# same length, so that is memory for nothing: for one layer of 1,536 x 576, forward and backward, 214 MiB after 170 lengths. With 32,
# which hold the shapes of one micro-batch, it is 9 MiB, in the same time (torch 2.13; tests/memory/test_measuring.py).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures allocations announces itself otherwise
choose_spinning(os.environ)

import_guard.install()

if TYPE_CHECKING:
    from qlora_lite.api import evaluate, load_model, merge, train
    from qlora_lite.plan import make_plan
    from qlora_lite.recipe import load_recipe

_HOMES = {
    "load_recipe": "qlora_lite.recipe",
    "make_plan": "qlora_lite.plan",
    "load_model": "qlora_lite.api",
    "train": "qlora_lite.api",
    "evaluate": "qlora_lite.api",
    "merge": "qlora_lite.api",
}
__all__ = ["evaluate", "load_model", "load_recipe", "make_plan", "merge", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_lite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
