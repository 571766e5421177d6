"""What fits a budget: the map of sequence lengths and batches, and the longest sequence.

A rehearsal takes tenths of a second, a map has dozens of cells, so few micro-batches are rehearsed and all others follow from them:

    labels      add what they add, whatever the rest and whatever is quantized: up to a chunk of the head in steps of 16 rows, then in
                another line
    straight    where attention needs no mask, bytes depend on the tokens of a row alone, whoever's they are, in a line
    by blocks   with soft caps and sliding windows, whose queries go in blocks, they grow in a line with the examples of one length, and
                in another with the length: one up to the window, another beyond it
    curved      models whose examples run one at a time build a whole mask: they grow in a parabola with the length

tests/plan/test_forecast.py holds all three against whole rehearsals.
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
KNOTS = (2048, 8192, 32768)  # tokens in a row: what the lines go through, one between each two
FEW = 16  # label tokens: the least that the head's matrix products take (model/head.py)
FAR = 4096  # tokens: the longest that is rehearsed of a model with masks, whose every block of queries takes its time; or four windows
STEP = 64  # tokens; lengths are given in multiples of it
ROW = 8192  # tokens: of the longest row of several examples that is rehearsed
Rehearse = Callable[[MicroBatch], Rehearsal]
Bytes = dict[str, float]  # by stretch


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


class Labels:
    """What label tokens add to each stretch of a step above FEW of them, whatever the depth, from at most four rehearsals of few layers.

    A chunk of the head is filled up to 16 rows (model/head.py); what is more than one chunk adds in another line.
    """

    def __init__(self, rehearse: Rehearse, *, chunk: int = CHUNK) -> None:
        self._rehearse = rehearse
        self._chunk = chunk
        self.added = cache(self._added)

    def _added(self, num_labels: int) -> Bytes:
        whole = 16 * math.ceil(num_labels / 16)
        is_one = num_labels <= self._chunk
        knots, at = ((FEW, self._chunk), whole) if is_one else ((self._chunk + 1, 4 * self._chunk), num_labels)
        few, *ends = (self._totals(labels) for labels in (FEW, *knots))
        return {stretch: size - few[stretch] for stretch, size in _line(knots, ends, at).items()}

    def _totals(self, num_labels: int) -> Bytes:
        return totals(self._rehearse(MicroBatch(KNOTS[0], 1, num_labels / KNOTS[0])))


class Growth:
    """Peaks of any micro-batch of a model, from few rehearsals. `labels` may be those of a method with the same head."""

    def __init__(self, rehearse: Rehearse, config: PreTrainedConfig, labels: Labels, *, label_share: float) -> None:
        self._rehearse = rehearse
        self._config = config
        self._labels = labels
        self._label_share = label_share
        self._raised: Callable[[], Bytes] = dict

    def raised(self, by: Callable[[], Bytes]) -> "Growth":
        """The same with so many bytes more in each stretch, whatever the micro-batch."""
        other = copy(self)
        other._raised = cache(by)
        return other

    def peak_bytes(self, length: int, batch: int = 1) -> int:
        """Of `batch` examples of `length` tokens."""
        bare = self._row(length * batch) if self._is_straight else self._examples(length, batch)
        labels = self._labels.added(batch * num_labels(MicroBatch(length, 1, self._label_share)))
        raised = self._raised()
        return max(round(bare[stretch] + labels[stretch] + raised.get(stretch, 0)) for stretch in bare)

    @property
    def num_weights(self) -> int:
        """Of the model: any rehearsal finds them, so one that peaks come from too."""
        length = KNOTS[0] if self._is_straight else self._lengths_about(KNOTS[0])[0]
        return self._rehearse(MicroBatch(length, 1, FEW / length)).num_weights

    @cached_property
    def _is_straight(self) -> bool:
        return is_straight(self._config)

    @cached_property
    def _packs(self) -> bool:
        return packs_rows(model_class(self._config))

    def _row(self, tokens: int) -> Bytes:
        """With FEW labels, of one row, whoever's the tokens are."""
        knots = (
            KNOTS[:2] if tokens <= KNOTS[1] else KNOTS[1:]
        )  # a stretch's highest instant may be another one for longer rows
        return _line(knots, [self._bare(knot, 1) for knot in knots], tokens)

    def _examples(self, length: int, batch: int) -> Bytes:
        """With FEW labels, of `batch` examples that do not share a row, or whose masks differ from one long example's."""
        lengths = self._lengths_about(length)
        curves = [self._alike(one, batch) for one in lengths]
        return {stretch: _polynomial(lengths, [curve[stretch] for curve in curves], length) for stretch in curves[0]}

    def _alike(self, length: int, batch: int) -> Bytes:
        """A second example adds what others do not: the sum of two gradients."""
        if batch == 1:
            return self._bare(length, 1)
        knots = 2, max(3, min(BATCHES[-1], ROW // length)) if self._packs else 3
        return _line(knots, [self._bare(length, knot) for knot in knots], batch)

    def _lengths_about(self, length: int) -> tuple[int, ...]:
        """Two or three that `length` is computed from, whole blocks of queries: up to the sliding window, or from there on."""
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
    """Of each stretch."""
    return {stretch: sum(parts.values()) for stretch, parts in rehearsal.stretches.items()}


def is_straight(config: PreTrainedConfig) -> bool:
    """Whether attention needs no mask in any layer and examples share a row, so that only the tokens of a row matter."""
    return why_not_shared(model_class(config), config, length=sys.maxsize) is None


def memory_map(growth: Growth, room: Room) -> tuple[Cell, ...]:
    """Peaks for LENGTHS (as far as the model has positions) by BATCHES."""
    lengths = [length for length in LENGTHS if room.positions is None or length <= room.positions]
    peaks = {(length, batch): growth.peak_bytes(length, batch) for length in lengths for batch in BATCHES}
    return tuple(Cell(length, batch, peak, peak <= room.budget_bytes) for (length, batch), peak in peaks.items())


def longest_length(growth: Growth, room: Room) -> int | None:
    """The longest sequence, in multiples of STEP, that one example a micro-batch may have; None when not even STEP tokens fit."""

    def fits(steps: int) -> bool:
        return growth.peak_bytes(steps * STEP) <= room.budget_bytes

    most = (room.positions or LENGTHS[-1] * 4) // STEP
    low, high = (most, most + 1) if most and fits(most) else (0, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP or None


def _line(at: tuple[int, int], values: Sequence[Bytes], x: int) -> Bytes:
    """Each stretch on the line through two points; at the first, that one alone is needed."""
    if x == at[0]:
        return values[0]
    share = (x - at[0]) / (at[1] - at[0])
    return {stretch: size + share * (values[1][stretch] - size) for stretch, size in values[0].items()}


def _polynomial(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """A line through two points, a parabola through three (Lagrange)."""
    total = 0.0
    for i, value in enumerate(values):
        others = [at[j] for j in range(len(at)) if j != i]
        total += value * math.prod((x - other) / (at[i] - other) for other in others)
    return total
