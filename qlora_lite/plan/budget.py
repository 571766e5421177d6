"""How much memory a run may take, and why: what was asked for, or what the device has free less a margin."""

from pathlib import Path

import psutil
import torch

from qlora_lite.units import format_bytes

# Left to the allocator's own rounding and holes: reserved memory may be so much above allocated memory.
_CARD_MARGIN_SHARE, _CARD_MARGIN_BYTES = 0.03, 256 * 2**20
# Left to everything else on the machine, and to what a process takes beside its tensors (profiler events, file pages).
_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES = 0.05, 2**30
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def budget_of(asked: int | str, device: str) -> tuple[int, str]:
    """-> (bytes, reason). `asked` is bytes, or "auto" for what `device` ("cpu", "cuda") has free now, less a margin."""
    if isinstance(asked, int):
        return asked, f"{format_bytes(asked)}: asked for"
    free, total = _free_on_card() if device == "cuda" else _free_on_host()
    share, least = (
        (_CARD_MARGIN_SHARE, _CARD_MARGIN_BYTES) if device == "cuda" else (_HOST_MARGIN_SHARE, _HOST_MARGIN_BYTES)
    )
    margin = max(least, int(share * total))
    budget = max(free - margin, free // 2)
    where = "the card" if device == "cuda" else "this machine"
    why = "the allocator's holes" if device == "cuda" else "the rest of the machine"
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
