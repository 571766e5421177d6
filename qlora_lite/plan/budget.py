"""The memory budget of a run, with its reason: the requested bytes, or the free memory of the device less a margin.

The margin of a card covers its allocator's fragmentation: the bytes that `doctor --measure` measured with sequences of many lengths, else
an assumed 3% of the card.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lite.device.accelerator import card_here, free_memory, give_back_cache
from qlora_lite.device.card import MARGIN_BYTES, MARGIN_SHARE, Card, usable_memory
from qlora_lite.memory.host import host_memory
from qlora_lite.memory.kept import KEPT, kept_measurement
from qlora_lite.units import format_bytes

# Reserved for other programs, and for this process's memory beside its tensors (profiler events, file pages).
_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES = 0.05, 2**30


def measured_here(card: Card, *, cache: Path) -> Mapping[str, Any]:
    """Return the figures that `doctor --measure` stored for `card`; {} for a CPU or a card that was not measured."""
    measurement = kept_measurement(cache / KEPT)
    if measurement is None or card.is_cpu or card_here() != card:
        return {}
    return measurement if measurement.get("card") == card.name else {}


def budget_of(asked: int | str, card: Card, *, measured: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """-> (bytes, why). `asked` is bytes, or "auto": the free memory of a device of this machine, or the memory that CUDA reports for
    another card, each less a margin.

    `measured` is the result of `measured_here` for the device.
    """
    if isinstance(asked, int):
        return asked, "asked for"
    if not card.is_cpu and card != card_here():
        return usable_memory(card)
    free, total = host_memory() if card.is_cpu else _free_on_card()
    share, least = (_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES) if card.is_cpu else (MARGIN_SHARE, MARGIN_BYTES)
    fragmentation = (measured or {}).get("fragmentation_bytes")
    is_measured = isinstance(fragmentation, int)
    margin = max(least, int(fragmentation or 0) if is_measured else int(share * total))
    budget = max(free - margin, free // 2)
    where = "this machine" if card.is_cpu else "the card"
    purpose = "other programs" if card.is_cpu else "the allocator's fragmentation"
    purpose += ", measured by doctor" if is_measured else ""
    return (
        budget,
        f"{format_bytes(free)} of {where}'s {format_bytes(total)} are free, less a margin for {purpose}",
    )


def host_budget_of(asked: int | str, card: Card) -> tuple[int, str]:
    """-> (bytes of host memory for parts of a model, why). On a CPU the device's memory is the host's, so nothing else is left."""
    if card.is_cpu:
        return 0, "the CPU's own memory is the budget"
    if isinstance(asked, int):
        return asked, "asked for"
    free, total = host_memory()
    margin = max(_HOST_MARGIN_BYTES, int(_HOST_MARGIN_SHARE * total))
    reason = f"{format_bytes(free)} of this machine's {format_bytes(total)} are free, less a margin for other programs"
    return max(free - margin, free // 2), reason


def _free_on_card() -> tuple[int, int]:
    """-> (free, total) bytes, after this process has released unused memory: an earlier run's model, cached blocks."""
    gc.collect()
    give_back_cache()
    return free_memory()
