"""Sizes that fit a budget: the map of sequence lengths and batches, and the longest sequence.

A rehearsal takes tenths of a second and a map has dozens of cells, so a few micro-batches are rehearsed and the others interpolated:

    labels      add the same bytes to any micro-batch, quantized or not: linear in steps of 16 labels up to a chunk of the head, then
                linear with another slope
    straight    without an attention mask, bytes are linear in the tokens of the packed sequence, however examples divide it
    by blocks   soft caps and sliding windows process queries in blocks: bytes are linear in the number of examples of one length, and
                linear in the length, with one slope up to the window and another beyond it
    curved      models that run examples one at a time build a whole mask: bytes are quadratic in the length

tests/plan/test_forecast.py compares all of them with whole rehearsals.
"""

import math
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property

from transformers import PreTrainedConfig

from qlora_lite.base.skeleton import model_class
from qlora_lite.base.source import context_window
from qlora_lite.model.attention import QUERY_BLOCK, packs_rows, sliding_window, why_not_shared
from qlora_lite.model.head import CHUNK
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, num_labels

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16)
KNOTS = (2048, 8192, 32768)  # tokens in a packed sequence: rehearsed points, with a line between each two
FEW = 16  # label tokens: the minimum of the head's matrix products (model/head.py)
FAR = 4096  # tokens: the longest rehearsed example of a model with masks, because each block of queries takes time; or four windows
STEP = 64  # tokens; lengths are multiples of it
ROW = 8192  # tokens of the longest rehearsed sequence of several examples
Rehearse = Callable[[MicroBatch], Rehearsal]
Bytes = dict[str, float]  # by stretch


@dataclass(frozen=True)
class Room:
    """The limits of a micro-batch: bytes on the device, and the model's positions (None: no limit)."""

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


class Labels:
    """Bytes that label tokens beyond FEW add to each stretch of a step at any depth, from at most four rehearsals of few layers.

    A chunk of the head is padded to multiples of 16 labels (model/head.py); above one chunk, bytes grow with another slope.
    """

    def __init__(self, rehearse: Rehearse, *, chunk: int = CHUNK) -> None:
        self._rehearse = rehearse
        self._chunk = chunk
        self.added = cache(self._added)

    def _added(self, num_labels: int) -> Bytes:
        whole = 16 * math.ceil(num_labels / 16)
        is_one = num_labels <= self._chunk
        knots, at = ((FEW, self._chunk), whole) if is_one else ((self._chunk + 1, 4 * self._chunk), num_labels)
        few, *ends = (totals(self._rehearse(MicroBatch(KNOTS[0], 1, labels / KNOTS[0]))) for labels in (FEW, *knots))
        return {stretch: size - few[stretch] for stretch, size in _line(knots, ends, at).items()}


class Growth:
    """Peaks of any micro-batch of a model, interpolated from a few rehearsals. `labels` may come from a method with the same head."""

    def __init__(self, rehearse: Rehearse, config: PreTrainedConfig, labels: Labels, *, label_share: float) -> None:
        self._rehearse = rehearse
        self._config = config
        self._labels = labels
        self._label_share = label_share
        self._raised: Callable[[], Bytes] = dict

    def raised(self, by: Callable[[], Bytes]) -> "Growth":
        """Return a copy whose every micro-batch needs the bytes of `by` more in each stretch."""
        growth = copy(self)
        growth._raised = cache(by)
        return growth

    def peak_bytes(self, length: int, batch: int = 1) -> int:
        """Return the peak of `batch` examples of `length` tokens."""
        bare = self._packed(length * batch) if self._is_straight else self._examples(length, batch)
        labels = self._labels.added(batch * num_labels(MicroBatch(length, 1, self._label_share)))
        raised = self._raised()
        return max(round(bare[stretch] + labels[stretch] + raised.get(stretch, 0)) for stretch in bare)

    @property
    def num_weights(self) -> int:
        """The number of weights of the model, from a rehearsal that the peaks need too."""
        length = KNOTS[0] if self._is_straight else self._lengths_about(KNOTS[0])[0]
        return self._rehearse(MicroBatch(length, 1, FEW / length)).num_weights

    @cached_property
    def _is_straight(self) -> bool:
        return is_straight(self._config)

    @cached_property
    def _packs(self) -> bool:
        return packs_rows(model_class(self._config))

    def _packed(self, tokens: int) -> Bytes:
        """Bytes of one packed sequence with FEW labels, however examples divide its tokens."""
        # The highest instant of a stretch may change with the length, so there are two lines.
        knots = KNOTS[:2] if tokens <= KNOTS[1] else KNOTS[1:]
        return _line(knots, [self._bare(knot, 1) for knot in knots], tokens)

    def _examples(self, length: int, batch: int) -> Bytes:
        """Bytes of `batch` examples with FEW labels that are not packed, or whose masks differ from one long example's."""
        lengths = self._lengths_about(length)
        curves = [self._alike(knot, batch) for knot in lengths]
        return {stretch: _polynomial(lengths, [curve[stretch] for curve in curves], length) for stretch in curves[0]}

    def _alike(self, length: int, batch: int) -> Bytes:
        """Bytes of equal examples. The second one adds more than later ones: the sum of two gradients."""
        if batch == 1:
            return self._bare(length, 1)
        knots = 2, max(3, min(BATCHES[-1], ROW // length)) if self._packs else 3
        return _line(knots, [self._bare(length, knot) for knot in knots], batch)

    def _lengths_about(self, length: int) -> tuple[int, ...]:
        """Return two or three lengths to interpolate `length` from, in whole blocks of queries: up to the sliding window, or beyond."""
        window, positions = sliding_window(self._config), context_window(self._config)
        if window is not None and length <= window:
            low, high = max(1, window // 4), max(2, window)
        else:
            low = QUERY_BLOCK * ((window or 0) // QUERY_BLOCK + 1)
            high = max(low + 2 * QUERY_BLOCK, min(positions or FAR, max(FAR, 4 * (window or 0))))
        return (low, high) if self._packs else (low, (low + high) // 2, high)

    def _bare(self, length: int, batch: int) -> Bytes:
        return totals(self._rehearse(MicroBatch(length, batch, FEW / (length * batch))))


def totals(rehearsal: Rehearsal) -> Bytes:
    """Return the bytes of each stretch, summed over its parts."""
    return {stretch: sum(parts.values()) for stretch, parts in rehearsal.stretches.items()}


def is_straight(config: PreTrainedConfig) -> bool:
    """Whether no layer needs a mask and examples are packed, so that only the tokens of a packed sequence count."""
    return why_not_shared(model_class(config), config, length=sys.maxsize) is None


def memory_map(growth: Growth, room: Room) -> tuple[Cell, ...]:
    """Return the peaks of LENGTHS (up to the model's positions) by BATCHES."""
    lengths = [length for length in LENGTHS if room.positions is None or length <= room.positions]
    peaks = {(length, batch): growth.peak_bytes(length, batch) for length in lengths for batch in BATCHES}
    return tuple(Cell(length, batch, peak, peak <= room.budget_bytes) for (length, batch), peak in peaks.items())


def longest_length(growth: Growth, room: Room) -> int | None:
    """Return the longest sequence, in multiples of STEP, of one example per micro-batch; None if STEP tokens do not fit."""

    def fits(steps: int) -> bool:
        return growth.peak_bytes(steps * STEP) <= room.budget_bytes

    limit = (room.positions or LENGTHS[-1] * 4) // STEP
    low, high = (limit, limit + 1) if limit and fits(limit) else (0, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP or None


def _line(at: tuple[int, int], values: Sequence[Bytes], x: int) -> Bytes:
    """Interpolate each stretch on a line through two points; at the first point, the second is not needed."""
    if x == at[0]:
        return values[0]
    share = (x - at[0]) / (at[1] - at[0])
    return {stretch: size + share * (values[1][stretch] - size) for stretch, size in values[0].items()}


def _polynomial(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """Interpolate: a line through two points, a parabola through three (Lagrange)."""
    total = 0.0
    for i, value in enumerate(values):
        rest = [at[j] for j in range(len(at)) if j != i]
        total += value * math.prod((x - point) / (at[i] - point) for point in rest)
    return total
