"""`Card`: the properties of a device, in one value. Number types, kernels, rehearsal and strategy depend on it.

    made from   the device of this machine (accelerator.py), the processor (`CPU`), or a row of known_cards.py (`card_named`)
    capability  NVIDIA's compute capability, (8, 9) for an RTX 4090; None for the processor

The choice of an attention kernel by type and head width is PyTorch's rule for CUDA (sdp_utils.cpp): FlashAttention-2 from capability 8.0
on, for 16 bits, head widths up to 256 and no mask; otherwise the memory-efficient kernel, whose memory also grows linearly with the
length. cuDNN's attention, which PyTorch prefers on 9.0 and 10.0, is switched off (numerics.py): it compiles a plan for each shape.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qlora_lite.device.known_cards import KNOWN_CARDS, REPORTED_GIB, REPORTED_SHARE
from qlora_lite.errors import UserError
from qlora_lite.units import format_bytes

Kernel = Literal["flash", "efficient", "cpu flash", "plain"]
_HALF_TYPES = (torch.float16, torch.bfloat16)
_WITH_BF16 = _WITH_FLASH = (8, 0)
_FLASH_WIDTH = 256  # the widest head that FlashAttention-2 takes
_SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # capabilities whose backward pass lacks the widths:
_NOT_THERE = range(193, 225)
# A CUDA context with training's kernels, outside torch's allocator: assumed until `doctor --measure` has measured it.
CONTEXT_BYTES = 500 * 2**20
# Reserve for the allocator's rounding and holes, as a share of a card's memory: also assumed.
MARGIN_SHARE, MARGIN_BYTES = 0.03, 256 * 2**20


@dataclass(frozen=True)
class Card:
    """A device. Rates are those of dense 16-bit products with fp32 sums and of its own memory; 0 when unknown."""

    name: str
    device: str  # torch's device type of its tensors: "cpu", "cuda"
    memory_bytes: int
    capability: tuple[int, int] | None = None
    num_sms: int = 0
    flops: float = 0.0  # per second
    bytes_per_s: float = 0.0
    l2_bytes: int = 0
    link_bytes_per_s: float = 0.0  # to host memory, one direction
    power_w: int = 0
    source: str = ""  # of the rates

    @property
    def is_cpu(self) -> bool:
        return self.capability is None

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16 (before capability 8.0: emulated and slow, so no)."""
        return self.capability is None or self.capability >= _WITH_BF16

    @property
    def pages(self) -> bool:
        """Whether optimizer state may be in managed memory, which moves to the host when the card is full."""
        return not self.is_cpu

    @property
    def round_to(self) -> int:
        """Allocations are multiples of this many bytes: the smallest block of CUDA's caching allocator."""
        return 1 if self.is_cpu else 512

    @property
    def cublas_workspace_bytes(self) -> int:
        """One handle's workspace: 32 MiB from capability 9.0 on, else 2 x 4,096 KiB + 8 x 16 KiB (torch 2.12's CublasHandlePool.cpp)."""
        if self.capability is None:
            return 0
        return 32 * 2**20 if self.capability >= (9, 0) else (2 * 4096 + 8 * 16) * 2**10

    @property
    def runtime_bytes(self) -> int:
        """Allocator memory of CUDA's libraries: a handle with workspace for the program's thread and one for autograd's."""
        return 2 * self.cublas_workspace_bytes

    @property
    def in_words(self) -> str:
        """`NVIDIA GeForce RTX 4090 (SM 8.9)`."""
        return self.name if self.capability is None else f"{self.name} (SM {self.capability[0]}.{self.capability[1]})"

    def attention_kernel(
        self,
        dtype: torch.dtype,
        width: int,
        value_width: int | None = None,
        *,
        has_mask: bool = False,
        trains: bool = True,
    ) -> Kernel:
        """The kernel for heads of width `width` (values `value_width`); `trains`: a backward pass follows."""
        same_width = value_width in (None, width)
        if self.capability is None:
            return "cpu flash" if same_width else "plain"
        is_left_out = trains and self.capability in _SMALL_SHARED_MEMORY and width in _NOT_THERE
        has_flash = self.capability >= _WITH_FLASH and dtype in _HALF_TYPES and not is_left_out
        if has_flash and same_width and width <= _FLASH_WIDTH and not has_mask:
            return "flash"
        return "efficient" if dtype != torch.bfloat16 or self.has_bf16 else "plain"


CPU = Card("CPU", "cpu", 0)


def card_named(name: str) -> Card:
    """The card of the table with this name, from `plan --cards` or from the driver. Raises UserError with the nearest names."""
    key = _key(name)
    if key in KNOWN_CARDS:
        return card_in_table(key)
    plain = {short: _plain(short) for short in KNOWN_CARDS}
    full = {short: _plain(row.full_name) for short, row in KNOWN_CARDS.items()}
    asked = _plain(name)
    exact = [short for short in KNOWN_CARDS if asked and asked in (plain[short], full[short])]
    parts = [
        short for short in KNOWN_CARDS if asked and (plain[short].endswith(asked) or plain[short].startswith(asked))
    ]
    if len(exact or parts) == 1:
        return card_in_table((exact or parts)[0])
    near = parts or difflib.get_close_matches(key, KNOWN_CARDS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(
        f"--card: {name!r} does not name exactly one card of the table; {hint}`plan --cards` lists all {len(KNOWN_CARDS)}"
    )


def name_of(card: Card) -> str:
    """The name for `--card` if the table has the card, else the driver's name."""
    return next((short for short, row in KNOWN_CARDS.items() if row.full_name == card.name), card.name)


def card_in_table(short: str) -> Card:
    """A row of the table as a `Card`; its memory is the amount that CUDA reports."""
    row = KNOWN_CARDS[short]
    return Card(
        name=row.full_name,
        device="cuda",
        memory_bytes=int(REPORTED_GIB.get(short, REPORTED_SHARE * row.memory_gib) * 2**30),
        capability=row.capability,
        num_sms=row.num_sms,
        flops=row.tflops_16 * 1e12,
        bytes_per_s=row.bandwidth_gb_s * 1e9,
        l2_bytes=int(row.l2_mib * 2**20),
        link_bytes_per_s=row.link_gb_s * 1e9,
        power_w=row.power_w,
        source="published figures",
    )


COMMON_CARD = card_in_table("rtx-4090")  # the card of a plan when none is present or named


def with_rates(card: Card) -> Card:
    """A present card with the rates of the table; for an unknown name, those of the slowest card of the nearest capability."""
    assert card.capability is not None
    rows = [card_in_table(short) for short in KNOWN_CARDS]
    own = [row for row in rows if row.name.lower() == card.name.lower()]
    versions = {row.capability for row in rows if row.capability is not None}
    nearest = min(versions, key=lambda version: abs(_number(version) - _number(card.capability or version)))
    alike = [row for row in rows if row.capability == nearest]
    row = own[0] if own else min(alike, key=lambda row: row.bytes_per_s)
    source = row.source if own else f"assumed, those of {row.name}: {card.name} is not in the table"
    return replace(
        card,
        flops=row.flops,
        bytes_per_s=row.bytes_per_s,
        link_bytes_per_s=row.link_bytes_per_s,
        power_w=row.power_w,
        source=source,
    )


def usable_memory(card: Card) -> tuple[int, str]:
    """-> (bytes that a run may use of a card that is not present, why): its memory less the CUDA context and a margin."""
    margin = max(MARGIN_BYTES, int(MARGIN_SHARE * card.memory_bytes))
    usable = card.memory_bytes - CONTEXT_BYTES - margin
    return usable, (
        f"CUDA reports about {format_bytes(card.memory_bytes)} on {card.name}, less {format_bytes(CONTEXT_BYTES)} "
        f"for its context and {format_bytes(margin)} for the allocator's holes, both assumed"
    )


def _number(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` and `rtx-4090` are `rtx4090`."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", "")
    return "".join(character for character in words if character.isalnum())


def _key(name: str) -> str:
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())
