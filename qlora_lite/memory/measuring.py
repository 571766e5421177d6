"""Measured memory of a step: allocation events on the CPU, the caching allocator's peak on CUDA, and the process's memory."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import RecordScope
from torch.profiler import record_function

from qlora_lite.device.accelerator import is_accelerator, torch_module
from qlora_lite.memory.ledger import PHASES, opened

_FIRST = "activations"  # the category until another one is set
_MARK = "qlora_lite makes "  # prefix of the events that separate phases


@dataclass
class Allocations:
    """Bytes above the start of the measurement; set when its block ends."""

    peak_bytes: int = 0
    peaks: dict[str, int] = field(default_factory=dict)  # by the ledger's category at that time


@contextmanager
def measure_allocations(device: str, into: Allocations | None = None) -> Iterator[Allocations]:
    """Measure the block's peaks of allocated device memory above its start, from the allocator; the result goes to `into`.

    On the CPU torch keeps an event for each allocation until the block ends: measure a micro-batch, not a step.
    """
    result = into if into is not None else Allocations()
    with (_accelerators_peaks if is_accelerator(device) else _cpu_peaks)(result):
        yield result
    result.peak_bytes = max(result.peaks.values(), default=0)


@contextmanager
def _accelerators_peaks(result: Allocations) -> Iterator[None]:
    """The caching allocator counts on the host, in the order of the calls, so no synchronization is needed."""
    torch_module().reset_peak_memory_stats()
    phases = _AllocatorPhases(result.peaks, before=torch_module().memory_allocated())
    with opened(phases):
        yield
    phases.end()


class _AllocatorPhases:
    """A book that reads the allocator's peak at every change of category."""

    def __init__(self, peaks: dict[str, int], *, before: int) -> None:
        self._peaks, self._before, self._current = peaks, before, _FIRST

    @property
    def current(self) -> str:
        return self._current

    @current.setter
    def current(self, category: str) -> None:
        if category not in PHASES:  # a part inside of a phase
            return
        self.end()
        self._current = category

    def end(self) -> None:
        peak = torch_module().max_memory_allocated() - self._before
        self._peaks[self._current] = max(self._peaks.get(self._current, 0), peak)
        torch_module().reset_peak_memory_stats()


@contextmanager
def _cpu_peaks(result: Allocations) -> Iterator[None]:
    with allocator_events() as events, opened(_CpuPhases()):
        yield
    result.peaks.update(_peaks_of_events(events))
    events.clear()
    give_back_free_memory()


@contextmanager
def allocator_events() -> Iterator[list[int | str]]:
    """List, when the block ends, the bytes of every allocation on the CPU (negative: given back) and the names of `record_function`.

    In the order of time. `torch.profiler.profile` would keep every operator as well, which takes several times as long.
    """
    events: list[int | str] = []
    profiler = torch.autograd.profiler.profile(profile_memory=True)
    config, activities = profiler.config(), profiler.kineto_activities
    torch.autograd._prepare_profiler(config, activities)
    torch.autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]  # not in torch's stubs
    try:
        yield events
    finally:
        result: Any = torch.autograd._disable_profiler()
    found = sorted(result.events(), key=lambda event: event.start_ns())
    events += [event.nbytes() if event.name() == "[memory]" else event.name() for event in found]


class _CpuPhases:
    """A book that records every change of category as an event among the allocator's."""

    def __init__(self) -> None:
        self._current = _FIRST

    @property
    def current(self) -> str:
        return self._current

    @current.setter
    def current(self, category: str) -> None:
        if category not in PHASES:
            return
        self._current = category
        with record_function(_MARK + category):
            pass


def allocator_statistics(device: str) -> dict[str, int] | None:
    """Statistics of torch's caching allocator: reserved bytes, largest free block, retries and failures; None on the CPU.

    A retry is an allocation that succeeded after the allocator had emptied its cache.
    """
    if not is_accelerator(device):
        return None
    stats = torch_module().memory_stats()
    blocks = [block for segment in torch_module().memory_snapshot() for block in segment["blocks"]]
    return {
        "reserved_bytes": stats["reserved_bytes.all.current"],
        "largest_free_bytes": max((block["size"] for block in blocks if block["state"] == "inactive"), default=0),
        "num_retries": stats["num_alloc_retries"],
        "num_out_of_memory": stats["num_ooms"],
    }


def rss_bytes() -> int:
    """Resident bytes of this process, including imports and the page cache of mapped files. 0 outside Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def give_back_free_memory() -> None:
    """Return freed heap pages to the system: glibc keeps them, and a step would leave hundreds of MiB of holes."""
    if sys.platform == "linux" and _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's own; musl has none
    except (AttributeError, OSError):
        return None


_malloc_trim = _find_malloc_trim()


def _peaks_of_events(events: list[int | str]) -> dict[str, int]:
    """Highest running sum of the allocator's events by category."""
    current, running, peaks = _FIRST, 0, {_FIRST: 0}
    for event in events:
        if isinstance(event, int):
            running += event
        elif event.startswith(_MARK):
            current = event.removeprefix(_MARK)
        peaks[current] = max(peaks.get(current, 0), running)
    return peaks
