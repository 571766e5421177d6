"""What fits a budget: the map of sequence lengths and batches, and the longest sequence.

Bytes grow in a straight line with the examples of a micro-batch, whatever the model; with its length they do where attention
needs no mask. So a row of the map takes two rehearsals, and the longest sequence is searched by halving.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16)
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


def memory_map(rehearse: Rehearse, room: Room) -> tuple[Cell, ...]:
    """Peaks for LENGTHS (as far as the model has positions) by BATCHES."""
    cells = []
    for length in (length for length in LENGTHS if room.positions is None or length <= room.positions):
        one, two = (_phase_bytes(rehearse(MicroBatch(length, n, room.label_share))) for n in (1, 2))
        for batch in BATCHES:
            peak = max(one[phase] + (batch - 1) * (two[phase] - one[phase]) for phase in one)
            cells.append(Cell(length, batch, peak, peak <= room.budget_bytes))
    return tuple(cells)


def longest_length(rehearse: Rehearse, room: Room) -> int | None:
    """The longest sequence, in multiples of STEP, that one example a micro-batch may have; None when not even STEP tokens fit."""

    def peak(steps: int) -> int:
        return rehearse(MicroBatch(steps * STEP, 1, room.label_share)).peak_bytes

    most = (room.positions or LENGTHS[-1] * 4) // STEP
    if most < 1 or peak(1) > room.budget_bytes:
        return None
    second = min(2048 // STEP, most)
    slope = (peak(second) - peak(1)) / max(1, second - 1)
    low, high = 1, most + 1  # `low` fits, `high` does not, or is not allowed
    num_tries = 0
    while high - low > 1:
        along_the_line = low + int((room.budget_bytes - peak(low)) / slope) if slope > 0 else most
        guess = along_the_line if num_tries < 4 else (low + high) // 2  # a mask makes the line a curve
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if peak(middle) <= room.budget_bytes else (low, middle)
        num_tries += 1
    return low * STEP


def _phase_bytes(rehearsal: Rehearsal) -> dict[str, int]:
    return {phase: sum(parts.values()) for phase, parts in rehearsal.phases.items()}
