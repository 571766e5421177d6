"""Tensors that wait in host memory while a card computes: where they are allocated, and copies in both directions.

Copies to and from a card run on its own stream, in order, without a wait, because the host memory is page-locked. torch's own allocator
of page-locked memory rounds to powers of two, up to twice what is needed, so the memory is our own: mapped pages, registered with the
driver, and kept for later tensors. If the driver refuses to register them, copies are slower and still correct.

On the CPU, and on meta, there is one memory: a tensor "on the host" is an ordinary one that ledgers count as host memory, and a copy "to
the device" is a copy, as on a card. So one code serves all devices, and a rehearsal counts both memories.
"""

import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Literal

import torch

from qlora_lite.device.accelerator import ACCELERATOR, is_accelerator, register_pages, synchronize
from qlora_lite.memory.ledger import counted_as
from qlora_lite.units import format_bytes

Home = Literal["device", "host"]
_free: dict[int, list[mmap.mmap]] = defaultdict(list)  # registered pages without a tensor, by size


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device, category: str) -> torch.Tensor:
    """An uninitialized tensor in host memory for a computation on `device`, counted as `category`."""
    with counted_as(category):
        if not is_accelerator(device):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        return _page_locked(max(1, prod(shape)) * dtype.itemsize).view(dtype)[: prod(shape)].view(tuple(shape))


def on_host(tensor: torch.Tensor, category: str) -> torch.Tensor:
    """A copy in host memory. The copy may still run: `wait_for_copies` before the CPU reads it."""
    copy = empty_on_host(tensor.shape, tensor.dtype, tensor.device, category)
    copy.copy_(tensor.detach(), non_blocking=True)
    return copy


def on_device(tensor: torch.Tensor, device: torch.device, home: Home) -> torch.Tensor:
    """The tensor on the device: itself if that is its home, else a copy."""
    if home == "device":
        return tensor
    return tensor.detach().to(device, non_blocking=True, copy=True)


def wait_for_copies(device: torch.device) -> None:
    """Wait until the device has finished its copies, before the CPU reads or writes memory that they use."""
    synchronize(device.type)


def _page_locked(num_bytes: int) -> torch.Tensor:
    """Pages for a tensor: the smallest free ones that are large enough, else new ones in place of all free ones, which are too small.

    So sequences of many lengths do not pile up pages of as many sizes.
    """
    large_enough = [size for size, pages in _free.items() if pages and size >= num_bytes]
    if large_enough:
        size = min(large_enough)
        pages = _free[size].pop()
    else:
        give_back_host_memory()
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            pages = mmap.mmap(-1, size)
        except OSError as error:
            raise MemoryError(f"the system has no {format_bytes(size)} of host memory left ({error})") from error
        register_pages(torch.frombuffer(pages, dtype=torch.uint8))
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    weakref.finalize(tensor.untyped_storage(), _keep_free, size, pages)
    return tensor[:num_bytes]


def _keep_free(size: int, pages: mmap.mmap) -> None:
    _free[size].append(pages)


def give_back_host_memory() -> None:
    """Return page-locked memory without a tensor to the system."""
    if not any(_free.values()):
        return
    synchronize(ACCELERATOR)  # copies from it may still run
    for pages in (pages for some in _free.values() for pages in some):
        register_pages(torch.frombuffer(pages, dtype=torch.uint8), undo=True)
    _free.clear()
