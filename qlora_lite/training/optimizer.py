"""AdamW from bitsandbytes, with updates that do not lose small steps.

A bf16 weight has 8 significant bits: at a learning rate of 2e-4, most single updates are below half the spacing of bf16 values, and
plain rounding loses them. So a trained bf16 weight is one half of an fp32 master: the weight holds the upper 16 bits, rounded, and
`low_bits` the other 16. The update is computed on the fp32 value, which is then split again:

    exact = join(weight, low_bits);  AdamW(exact, fp32 gradient);  weight, low_bits = split(exact)

An update is lossless: the master changes like an fp32 weight, bit for bit, for 2 bytes per weight more than bf16.
Rounding is half up, not half to even: then the lower half tells whether the upper half was rounded up, and `join` is exact.
`init_states` creates the state, not the first step, so that its bytes can be counted and checkpoints loaded into it.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.accelerator import free_memory
from qlora_lite.errors import DoesNotFit
from qlora_lite.files.library_names import B_FACTOR
from qlora_lite.memory.host import host_memory
from qlora_lite.memory.ledger import PAGED, card_of, counted_as
from qlora_lite.units import format_bytes

_bnb_optim: Any = bitsandbytes.optim  # only partly typed
OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw")
_PAGED_FROM = 100_000  # weights; bitsandbytes keeps the state of smaller tensors on the device
# The saved tensors of a parameter's state. The 8-bit maps are constants shared by all parameters: recreated, never saved.
STATE_TENSORS = ("state1", "state2", "absmax1", "absmax2", "low_bits")


class _ExactUpdates:
    """Mixin for bitsandbytes' two-state optimizers: fp32 updates of bf16 parameters with stored lower 16 bits."""

    def init_states(self: Any) -> None:
        """Create the state of every parameter. Raises DoesNotFit if managed memory has no room for paged state."""
        _refuse_too_much_to_page(self)
        with warnings.catch_warnings():
            # The plan's reasons mention it.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                        if parameter.dtype == torch.bfloat16:
                            self.state[parameter]["low_bits"] = torch.zeros_like(parameter, dtype=torch.int16)

    def get_state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not p.is_meta:
            buffer: torch.Tensor = super().get_state_buffer(p, dtype=dtype)  # type: ignore[misc]
            return buffer
        is_paged = self.is_paged and card_of(p).pages and p.numel() >= _PAGED_FROM
        with counted_as(PAGED if is_paged else "optimizer"):
            return torch.empty_like(p, dtype=dtype)

    @torch.no_grad()
    def update_step(self: Any, group: dict, p: torch.Tensor, gindex: int, pindex: int) -> None:
        state = self.state[p]
        if "low_bits" not in state:
            assert p.grad is None or p.grad.dtype == p.dtype, (
                "the kernel assumes that gradient and weight have one type"
            )
            super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
            return
        exact = join(p, state["low_bits"])
        exact.grad = p.grad
        self.state[exact] = state
        super().update_step(group, exact, gindex, pindex)  # type: ignore[misc]
        del self.state[exact]
        high, low = split(exact)
        p.copy_(high)
        state["low_bits"].copy_(low)
        p.grad = None  # frees memory for the fp32 copy of the next weight


def _refuse_too_much_to_page(optimizer: Any) -> None:
    """Raise DoesNotFit if managed memory is too small: bitsandbytes ends the process when an allocation fails."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if not p.is_meta]
    if not optimizer.is_paged or not any(card_of(p).pages for p in parameters):
        return
    state_bytes_a_weight = 2 if isinstance(optimizer, PagedAdamW8bit) else 8
    needed = state_bytes_a_weight * sum(p.numel() for p in parameters if p.numel() >= _PAGED_FROM)
    room = host_memory()[0] + free_memory()[0]
    if needed > room:
        raise DoesNotFit(
            f"train.optimizer: its state needs {format_bytes(needed)} of managed memory; card and host together have "
            f"{format_bytes(room)} free. Use train.optimizer=paged_adamw_8bit, a smaller lora.r or a smaller model"
        )


def split(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split fp32 -> (bf16, rounded half up; the lower 16 bits as int16). `join` restores the same fp32."""
    bits = exact.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Restore the fp32 values from the two halves of `split`."""
    lower = low.to(torch.int32) & 0xFFFF
    upper = high.view(torch.int16).to(torch.int32) - (lower >> 15)  # undo the rounding up
    return ((upper << 16) | lower).view(torch.float32)


class PagedAdamW8bit(_ExactUpdates, _bnb_optim.PagedAdamW8bit):
    """2 bytes of state per weight in blocks of 256 (arXiv 2110.02861); tensors from 100,000 weights up may page to the host."""


class PagedAdamW32bit(_ExactUpdates, _bnb_optim.PagedAdamW32bit):
    """8 bytes of state per weight; tensors from 100,000 weights up may page to the host."""


class AdamW(_ExactUpdates, _bnb_optim.AdamW32bit):
    """8 bytes of state per weight, always on the device."""


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    loraplus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """Create one of OPTIMIZERS for the trainable parameters, with its state. Betas and epsilon are AdamW's defaults.

    Factors B learn `loraplus_ratio` times as fast as the rest (LoRA+, arXiv 2402.12354): see `set_learning_rate`.
    """
    kinds: dict[str, Any] = {"paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW32bit, "adamw": AdamW}
    b_factors: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for parameter_name, parameter in named_parameters:
        if parameter.requires_grad:
            (b_factors if B_FACTOR in parameter_name else rest).append(parameter)
    groups = [{"params": rest, "lr_ratio": 1.0}, {"params": b_factors, "lr_ratio": loraplus_ratio}]
    optimizer: Any = kinds[name](groups, lr=learning_rate, weight_decay=weight_decay)
    set_learning_rate(optimizer, learning_rate)
    optimizer.init_states()
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step: `learning_rate`, multiplied by the LoRA+ ratio for factors B."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """-> (bytes of state tensors on the device, bytes in managed memory, which may page to the host); shared tensors count once."""
    tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    paged = [tensor.nbytes for tensor in tensors.values() if is_paged(tensor)]
    return sum(tensor.nbytes for tensor in tensors.values()) - sum(paged), sum(paged)


def is_paged(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in managed memory, by bitsandbytes' mark."""
    return bool(getattr(tensor, "is_paged", False))
