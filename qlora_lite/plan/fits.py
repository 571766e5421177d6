"""What fits a budget: the map of sequence lengths and batches, and the longest sequence.

A rehearsal takes tenths of a second, a map has dozens of cells. Where attention needs no mask, bytes depend on the tokens of a row
alone, whoever's they are, in a straight line that bends once, where the labels fill the head's chunk. Elsewhere (soft caps, sliding
windows, models whose examples run one at a time) they grow so with the examples of one length, and each length is rehearsed by
itself. The longest sequence is searched for, and rehearsed itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedConfig

from qlora_lite.model.attention import packs_rows
from qlora_lite.model.head import CHUNK
from qlora_lite.model.skeleton import model_class
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16)
KNOTS = (512, 4096, 32768)  # tokens in a row
STEP = 64  # tokens; lengths are given in multiples of it
Rehearse = Callable[[MicroBatch], Rehearsal]


@dataclass(frozen=True)
class Room:
    """What a micro-batch must stay within: bytes on the device, and the model's positions (None: no limit)."""

    budget_bytes: int
    positions: int | None = None
    label_share: float = 0.1


@dataclass(frozen=True)
class Cell:
    """One cell of the map: a micro-batch of `batch` examples of `max_seq_length` tokens."""

    max_seq_length: int
    batch: int
    peak_bytes: int
    fits: bool


class Growth:
    """Peaks of any micro-batch, from few rehearsals."""

    def __init__(self, rehearse: Rehearse, *, label_share: float, is_straight: bool) -> None:
        self._rehearse = rehearse
        self._label_share = label_share
        self._filled = math.ceil(
            CHUNK / label_share
        )  # tokens whose labels fill the head's chunk: the line bends there, and steps up at a second chunk
        self.is_straight = is_straight

    def peak_bytes(self, length: int, batch: int = 1) -> int:
        """Of `batch` examples of `length` tokens, along the lines."""
        if self.is_straight:
            at, knots = length * batch, sorted({KNOTS[0], self._filled, 2 * self._filled, KNOTS[-1]})
            low, high = next(((a, b) for a, b in pairwise(knots) if at <= b), tuple(knots[-2:]))
            one, two = self._phases(low, 1), self._phases(high, 1)
        else:
            filled = max(1, self._filled // length)
            at, knots = batch, sorted({1, filled, filled + 1, 2 * filled + 2})
            low, high = next(((a, b) for a, b in pairwise(knots) if at <= b), tuple(knots[-2:]))
            one, two = self._phases(length, low), self._phases(length, high)
        share = (at - low) / (high - low)
        return max(round(one[phase] + share * (two[phase] - one[phase])) for phase in one)

    def exact_peak_bytes(self, length: int) -> int:
        """Of one example of `length` tokens, rehearsed."""
        return max(self._phases(length, 1).values())

    def _phases(self, length: int, batch: int) -> dict[str, int]:
        found = self._rehearse(MicroBatch(length, batch, self._label_share))
        return {phase: sum(parts.values()) for phase, parts in found.phases.items()}


def is_straight(config: PreTrainedConfig) -> bool:
    """Whether attention needs no mask in any layer and examples share a row, so that only the tokens of a row matter."""
    masks = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")
    uses_window = getattr(config, "use_sliding_window", True)  # Qwen names a window and does not use it
    masked = any(getattr(config, name, None) for name in masks) and uses_window
    return packs_rows(model_class(config)) and not masked


def memory_map(growth: Growth, room: Room) -> tuple[Cell, ...]:
    """Peaks for LENGTHS (as far as the model has positions) by BATCHES."""
    lengths = [length for length in LENGTHS if room.positions is None or length <= room.positions]
    peaks = {(length, batch): growth.peak_bytes(length, batch) for length in lengths for batch in BATCHES}
    return tuple(Cell(length, batch, peak, peak <= room.budget_bytes) for (length, batch), peak in peaks.items())


def longest_length(growth: Growth, room: Room) -> int | None:
    """The longest sequence, in multiples of STEP, that one example a micro-batch may have; None when not even STEP tokens fit."""

    def fits(steps: int) -> bool:
        return growth.exact_peak_bytes(steps * STEP) <= room.budget_bytes

    most = (room.positions or LENGTHS[-1] * 4) // STEP
    if most < 1 or not fits(1):
        return None
    low, high = _around(_guess(growth, room, most), fits, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP


def _around(guess: int, fits: Callable[[int], bool], most: int) -> tuple[int, int]:
    """From `guess` in growing strides -> (steps that fit, more steps that do not or are not allowed); 1 fits."""
    stride, here, fits_here = 1, guess, fits(guess)
    while not (fits_here and here == most):
        there = min(most, here + stride) if fits_here else max(1, here - stride)
        if fits(there) != fits_here:
            return (here, there) if fits_here else (there, here)
        here, stride = there, 2 * stride
    return most, most + 1


def _guess(growth: Growth, room: Room, most: int) -> int:
    """Where the line through two lengths meets the budget. Long ones are dear where a mask is made block by block."""
    ends = [min(tokens, most * STEP) for tokens in (KNOTS[-2:] if growth.is_straight else (1024, 2048))]
    one, two = (growth.exact_peak_bytes(tokens) for tokens in ends)
    if two <= one:
        return most
    tokens = ends[0] + (ends[1] - ends[0]) * (room.budget_bytes - one) / (two - one)
    return max(1, min(most, int(tokens) // STEP))
