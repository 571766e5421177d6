"""Which examples make an optimizer step, and how a step is packed into micro-batches.

In: `Examples` (token ids by index). Out: `Batch`, one row of packed examples, no padding. B examples, T tokens, N label tokens.
Surprising: a step is a pure function of (seed, epoch, step), so a resumed run needs no saved data position beyond the step number.
A step is split so that its micro-batches hold about the same number of *tokens*; the loss must therefore be divided by the label
tokens of the whole step, never averaged over micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qlora_lite.data.template import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch: examples packed one after the other in a single row. Attention must not cross example borders."""

    input_ids_1T: Tensor  # int64 [1, T]
    position_ids_1T: Tensor  # int64 [1, T]; restart at 0 where an example starts
    lengths: tuple[int, ...]  # tokens per example; sum == T
    predictor_N: Tensor  # int64 [N]; positions in the row whose hidden state predicts a label (label position - 1)
    target_N: Tensor  # int64 [N]; the token ids to predict
    rows: tuple[int, ...]  # indices of the examples, in the order they are packed

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids_1T=self.input_ids_1T.to(device),
            position_ids_1T=self.position_ids_1T.to(device),
            predictor_N=self.predictor_N.to(device),
            target_N=self.target_N.to(device),
        )


class TokenizedRows(Protocol):
    """What batching needs to know of `Examples`."""

    @property
    def lengths(self) -> np.ndarray: ...  # int [num examples]: tokens per example

    def encoded(self, index: int) -> Encoded: ...


class StepSampler:
    """The examples of every optimizer step: a seeded shuffle per epoch, cut into steps; an epoch's last step may be smaller.

    `max_steps` wins over `epochs` when it is given (as in the Hugging Face trainer): fewer steps, or more epochs.
    """

    def __init__(
        self, num_examples: int, *, examples_per_step: int, epochs: float, max_steps: int | None, seed: int
    ) -> None:
        """Raises ValueError when a count is below 1 or the seed is negative."""
        counts = {"num_examples": num_examples, "examples_per_step": examples_per_step, "max_steps": max_steps}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {count}")
        if not epochs > 0 or math.isinf(epochs):
            raise ValueError(f"epochs: expected a number above 0, got {epochs}")
        if seed < 0:
            raise ValueError(f"seed: expected a whole number of 0 or more, got {seed}")
        self.num_examples = num_examples
        self.examples_per_step = examples_per_step
        self.steps_per_epoch = math.ceil(num_examples / examples_per_step)
        self.num_steps = max_steps if max_steps is not None else math.ceil(epochs * self.steps_per_epoch)
        self.seed = seed
        self._order_of_epoch: tuple[int, np.ndarray] | None = None  # the last epoch's order; recomputed, never saved

    def __len__(self) -> int:
        """Number of optimizer steps."""
        return self.num_steps

    def rows_of_step(self, step: int) -> list[int]:
        """Example indices of step `step`, counted from 0. Raises IndexError outside `range(len(self))`."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0 to {self.num_steps - 1}")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.examples_per_step
        rows: list[int] = self._order(epoch)[start : start + self.examples_per_step].tolist()
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            purpose = int.from_bytes(b"order", "big")  # keeps this stream apart from other users of the same seed
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, purpose, epoch])))
            self._order_of_epoch = (epoch, generator.permutation(self.num_examples))
        return self._order_of_epoch[1]


def make_batches(examples: TokenizedRows, rows: Sequence[int], *, micro_batch_tokens: int) -> list[Batch]:
    """Pack the rows of one step into few, evenly filled micro-batches of at most `micro_batch_tokens` tokens each.

    A single example longer than that is a batch of its own. The largest batch comes last, when all
    gradients are there: that is where a step's memory peaks, and where it is measured.
    Deterministic; raises ValueError when `micro_batch_tokens` is below 1.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens: expected a whole number above 0, got {micro_batch_tokens}")
    lengths = {row: int(examples.lengths[row]) for row in rows}
    too_long = [[row] for row in rows if lengths[row] > micro_batch_tokens]
    fitting = [row for row in rows if lengths[row] <= micro_batch_tokens]
    groups = [sorted(group) for group in too_long + _split_evenly(fitting, lengths, micro_batch_tokens)]
    groups.sort(key=lambda group: (sum(lengths[row] for row in group), group))
    return [pack_batch([examples.encoded(row) for row in group], group) for group in groups]


def step_with_largest_batch(
    examples: TokenizedRows, sampler: StepSampler, micro_batch_tokens: int, *, first: int
) -> int:
    """Step that packs the longest row, decided on lengths alone: a step of many tokens fills its micro-batches."""
    lengths = examples.lengths
    tokens = {step: int(lengths[sampler.rows_of_step(step)].sum()) for step in range(first, len(sampler))}
    full = [step for step, total in tokens.items() if total >= micro_batch_tokens]
    if not full:
        return max(tokens, key=lambda step: tokens[step], default=first)
    # The fewer tokens are left over, the fuller the micro-batches: an even split of `total` into ceil(total / limit) parts.
    return max(full, key=lambda step: tokens[step] / math.ceil(tokens[step] / micro_batch_tokens))


def largest_step(examples: TokenizedRows, sampler: StepSampler, micro_batch_tokens: int, *, first: int) -> list[Batch]:
    """The micro-batches of that step, of all from `first` on; the largest is the last."""
    step = step_with_largest_batch(examples, sampler, micro_batch_tokens, first=first)
    return make_batches(examples, sampler.rows_of_step(step), micro_batch_tokens=micro_batch_tokens)


def pack_batch(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
    """Pack tokenized examples into one `Batch`, in the given order. T is the sum of their lengths."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    predictors: list[int] = []
    for example in encoded:
        start, length = len(input_ids), len(example.input_ids)
        input_ids.extend(example.input_ids)
        position_ids.extend(range(length))
        predictors.extend(start + position for position in example.predictors)
    input_ids_1T = torch.tensor([input_ids], dtype=torch.int64)
    predictor_N = torch.tensor(predictors, dtype=torch.int64)
    return Batch(
        input_ids_1T=input_ids_1T,
        position_ids_1T=torch.tensor([position_ids], dtype=torch.int64),
        lengths=tuple(len(example.input_ids) for example in encoded),
        predictor_N=predictor_N,
        target_N=input_ids_1T[0, predictor_N + 1],
        rows=tuple(rows),
    )


def _split_evenly(rows: list[int], lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Fewest groups first-fit decreasing finds (at most 11/9 of the optimum), or fewer if an even split already fits.

    For each possible number of groups, from the lower bound up, try the even split (longest first into the emptiest group).
    """
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    first_fit = _first_fit(longest_first, lengths, capacity)
    lower_bound = -(-sum(lengths[row] for row in rows) // capacity)
    for num_groups in range(lower_bound, len(first_fit) + 1):
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        filled = [0] * num_groups
        for row in longest_first:
            emptiest = filled.index(min(filled))
            groups[emptiest].append(row)
            filled[emptiest] += lengths[row]
        if max(filled, default=0) <= capacity:
            return groups
    return first_fit


def _first_fit(longest_first: list[int], lengths: dict[int, int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    free: list[int] = []
    for row in longest_first:
        place = next((i for i, room in enumerate(free) if room >= lengths[row]), len(groups))
        if place == len(groups):
            groups.append([])
            free.append(capacity)
        groups[place].append(row)
        free[place] -= lengths[row]
    return groups
