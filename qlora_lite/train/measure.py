"""What a step really takes: allocation events on the CPU, the caching allocator's peak on CUDA, and the process's memory."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """Bytes above what was allocated when the measurement began; set when its block ends."""

    peak_bytes: int = 0


@contextmanager
def measure_allocations(device: str, into: Allocations | None = None) -> Iterator[Allocations]:
    """Measure the block's peak of allocated device memory above its start, from the allocator itself; the result is `into`.

    On the CPU the profiler keeps about 1.5 KB an event until the block is over: measure a micro-batch, not a step.
    """
    result = into if into is not None else Allocations()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    result.peak_bytes = _peak_of_events(profiler)
    del profiler
    give_back_free_memory()


def rss_bytes() -> int:
    """Resident memory of this process: all of it, imports and page cache of mapped files included. 0 outside Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def give_back_free_memory() -> None:
    """Return freed heap pages to the system: glibc keeps them, and a step would leave hundreds of MiB of holes behind."""
    if sys.platform == "linux" and _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's own; musl has none
    except (AttributeError, OSError):
        return None


_malloc_trim = _find_malloc_trim()


def _peak_of_events(profiler: profile) -> int:
    """Highest running sum of the allocator's events; an event's size is negative where memory was freed."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak
