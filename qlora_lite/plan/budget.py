"""How much memory a run may take, and why: what was asked for, or what the device has free less a margin.

The margin of a card is what its allocator may waste: what `doctor --measure` found on it, else 3%, which is assumed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from qlora_lite.measured import KEPT, kept_measurement
from qlora_lite.units import format_bytes

# Left to the allocator's own rounding and holes: reserved memory may be so much above allocated memory.
_CARD_MARGIN_SHARE, _CARD_MARGIN_BYTES = 0.03, 256 * 2**20
# Left to everything else on the machine, and to what a process takes beside its tensors (profiler events, file pages).
_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES = 0.05, 2**30
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def measured_here(device: str, *, cache: Path) -> Mapping[str, Any]:
    """What `doctor --measure` kept of this machine's card; nothing on the CPU, or where it was not measured or on another card."""
    kept = kept_measurement(cache / KEPT)
    if kept is None or device != "cuda" or not torch.cuda.is_available():
        return {}
    return kept if kept.get("card") == torch.cuda.get_device_name() else {}


def budget_of(asked: int | str, device: str, *, measured: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """-> (bytes, reason). `asked` is bytes, or "auto" for what `device` ("cpu", "cuda") has free now, less a margin.

    `measured` is what `measured_here` says of the device.
    """
    if isinstance(asked, int):
        return asked, f"{format_bytes(asked)}: asked for"
    free, total = _free_on_card() if device == "cuda" else _free_on_host()
    share, least = (
        (_CARD_MARGIN_SHARE, _CARD_MARGIN_BYTES) if device == "cuda" else (_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES)
    )
    waste = float((measured or {}).get("fragmentation_ratio", 0))
    is_measured = waste >= 1
    share = waste - 1 if is_measured else share
    margin = max(least, int(share * total))
    budget = max(free - margin, free // 2)
    where = "the card" if device == "cuda" else "this machine"
    why = "the allocator's holes" if device == "cuda" else "the rest of the machine"
    why += ", which doctor measured" if is_measured else ""
    return (
        budget,
        f"{format_bytes(budget)}: of {where}'s {format_bytes(total)}, {format_bytes(free)} are free, less a margin for {why}",
    )


def _free_on_card() -> tuple[int, int]:
    free, total = torch.cuda.mem_get_info()
    return int(free), int(total)


def _free_on_host() -> tuple[int, int]:
    """Of the machine, or of the container that this process is confined to."""
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    for limit, used in _CGROUPS:
        if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
            most = int(limit.read_text())
            free, total = min(free, max(0, most - int(used.read_text()))), min(total, most)
    return free, total
