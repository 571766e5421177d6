"""The devices of this machine: abilities, memory, random numbers. Only this module queries torch about a device by name.

`ACCELERATOR` is torch's name for the one kind of accelerator that the program's libraries support: "cuda", also in AMD's builds of
torch. All other code queries a `Card`. Tests replace it by a stand-in device (tests/standin).
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from qlora_lite.device.card import CPU, Card, with_rates
from qlora_lite.errors import UserError

ACCELERATOR = "cuda"


def choose_device(asked: str) -> tuple[Card, str]:
    """`auto | cpu | cuda` -> (device, why it is this one). Raises UserError for cuda without a CUDA device."""
    if asked == "cpu":
        return CPU, "asked for"
    card = card_here()
    if card is not None:
        return card, card.in_words if asked == "auto" else "asked for"
    if asked == "cuda":
        raise UserError("device: cuda was asked for, but torch finds no CUDA device. Use device: cpu or auto")
    return CPU, "torch finds no CUDA device"


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16 products. Without them it converts, which is several times slower than fp32.

    AVX-512 without its bf16 instructions does not count: oneDNN supports bf16 there by converting.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def cpu_has_amx() -> bool:
    """Whether this processor computes bf16 products in tile registers."""
    return cpu_multiplies_bf16() and bool(torch.cpu._is_amx_tile_supported())


def torch_module() -> Any:
    """torch.cuda."""
    return torch.get_device_module(ACCELERATOR)


def is_accelerator(device: str | torch.device) -> bool:
    """Whether tensors of `device` are on the accelerator."""
    return torch.device(device).type == ACCELERATOR


@cache
def card_here() -> Card | None:
    """The default accelerator; None on a machine without one."""
    module = torch_module()
    return card_at_index(module.current_device()) if module.is_available() else None


def card_at_index(index: int) -> Card:
    """The card with torch's number `index`."""
    properties = torch_module().get_device_properties(index)
    return with_rates(
        Card(
            name=properties.name,
            device=ACCELERATOR,
            memory_bytes=int(properties.total_memory),
            capability=(properties.major, properties.minor),
            num_sms=properties.multi_processor_count,
            l2_bytes=int(getattr(properties, "L2_cache_size", 0)),  # torch's name; missing in older builds
        )
    )


def card_at(device: str | torch.device) -> Card:
    """The card of a torch device of this machine."""
    if not is_accelerator(device):
        return CPU
    card = card_here()
    assert card is not None, f"tensors on {device} without such a device"
    return card


def recipe_word(card: Card) -> str:
    """The value of a recipe's `device` key: "cpu" or "cuda"."""
    return "cpu" if card.is_cpu else "cuda"


def fastest_device() -> str:
    """The device for work that any device can do: the accelerator if there is one."""
    return "cpu" if card_here() is None else ACCELERATOR


def free_memory(index: int | None = None) -> tuple[int, int]:
    """-> (free, total) bytes of the accelerator, from the driver."""
    free, total = torch_module().mem_get_info(index)
    return int(free), int(total)


def synchronize(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if is_accelerator(device):
        torch_module().synchronize()


def register_pages(pages: torch.Tensor, *, undo: bool = False) -> None:
    """Lock host memory in place, so that copies to and from the accelerator need no wait; without effect if the driver refuses."""
    runtime = getattr(torch_module(), "cudart", None)
    if runtime is None:
        return
    if undo:
        runtime().cudaHostUnregister(pages.data_ptr())
    else:
        runtime().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0)


class CopyStream:
    """A stream for copies from host memory, beside the one that computes."""

    def __init__(self) -> None:
        self._stream = torch_module().Stream()

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, after: Any) -> Any:
        """Begin to copy `sources` into `targets` once the event `after` (None: now) has happened; return the event of its end."""
        module = torch_module()
        if after is not None:
            self._stream.wait_event(after)
        else:
            self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def record_on_current(self) -> Any:
        """An event at the end of what the computing stream has been given so far."""
        return torch_module().current_stream().record_event()


def copy_stream(device: torch.device) -> CopyStream | None:
    """A new stream for copies to `device`; None where there is one memory, or no stream."""
    return CopyStream() if is_accelerator(device) and hasattr(torch_module(), "Stream") else None


def give_back_cache() -> None:
    """Return unused memory of the caching allocator to the card."""
    if card_here() is not None:
        torch_module().empty_cache()


def random_state() -> torch.Tensor | None:
    """The state of the accelerator's generator; None without an accelerator."""
    return None if card_here() is None else torch_module().get_rng_state()


def set_random_state(state: torch.Tensor) -> None:
    torch_module().set_rng_state(state)


@contextmanager
def same_random_numbers(device: str) -> Iterator[None]:
    """Restore the random generators of the CPU and of `device` after the block."""
    devices = [torch_module().current_device()] if is_accelerator(device) else []
    with torch.random.fork_rng(devices=devices, device_type=ACCELERATOR):
        yield
