"""How much memory a run may take, and why: what was asked for, or what the device has free less a margin.

The margin of a card is what its allocator may waste: the bytes that `doctor --measure` found on it with rows of many lengths, else 3% of
the card, which is assumed.
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

# Left to everything else on the machine, and to what a process takes beside its tensors (profiler events, file pages).
_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES = 0.05, 2**30


def measured_here(card: Card, *, cache: Path) -> Mapping[str, Any]:
    """What `doctor --measure` kept of `card`; nothing for a CPU, or where it was not measured or another one was."""
    kept = kept_measurement(cache / KEPT)
    if kept is None or card.is_cpu or card_here() != card:
        return {}
    return kept if kept.get("card") == card.name else {}


def budget_of(asked: int | str, card: Card, *, measured: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """-> (bytes, reason). `asked` is bytes, or "auto": of a device that is here what it has free now, of another card what CUDA
    reports on it, each less a margin.

    `measured` is what `measured_here` says of the device.
    """
    if isinstance(asked, int):
        return asked, f"{format_bytes(asked)}: asked for"
    if not card.is_cpu and card != card_here():
        return usable_memory(card)
    free, total = host_memory() if card.is_cpu else _free_on_card()
    share, least = (_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES) if card.is_cpu else (MARGIN_SHARE, MARGIN_BYTES)
    holes = (measured or {}).get("fragmentation_bytes")
    is_measured = isinstance(holes, int)
    margin = max(least, int(holes or 0) if is_measured else int(share * total))
    budget = max(free - margin, free // 2)
    where = "this machine" if card.is_cpu else "the card"
    why = "the rest of the machine" if card.is_cpu else "the allocator's holes"
    why += ", which doctor measured" if is_measured else ""
    return (
        budget,
        f"{format_bytes(budget)}: of {where}'s {format_bytes(total)}, {format_bytes(free)} are free, less a margin for {why}",
    )


def _free_on_card() -> tuple[int, int]:
    """-> (free, all) bytes, after this process has returned what it no longer uses: an earlier run's model, cached blocks."""
    gc.collect()
    give_back_cache()
    return free_memory()
