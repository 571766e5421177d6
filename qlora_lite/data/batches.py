"""The examples of each optimizer step, packed into micro-batches.

In: `Examples` (token ids by index). Out: `Batch`, one packed sequence, no padding. B examples, T tokens, N label tokens.
Surprising: a step is a pure function of (seed, epoch, step), so a resumed run needs only the step number, no data position.
The micro-batches of a step have about the same number of *tokens*; the loss must therefore be divided by the label tokens of the
whole step, never averaged over micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from qlora_lite.data.template import Encoded
from qlora_lite.data.trees import Node, Piece, TokenizedRows, families, grow
from qlora_lite.model.tree_attention import NO_PARENT


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch: one packed sequence of segments. A segment is an example or, if examples share a prefix, a run of tokens that
    continues another segment. Attention must stay within a segment and the segments it continues."""

    input_ids_1T: Tensor  # int64 [1, T]
    position_ids_1T: (
        Tensor  # int64 [1, T]; from 0 at the start of an example; a segment with a parent continues the parent's count
    )
    lengths: tuple[int, ...]  # tokens per segment; sum == T
    parents: tuple[int, ...]  # the segment that each one continues; NO_PARENT at the start of an example
    predictor_N: Tensor  # int64 [N]; positions in the sequence whose hidden state predicts a label (label position - 1)
    target_N: Tensor  # int64 [N]; the token ids to predict
    rows: tuple[int, ...]  # indices of the examples, in packing order

    @property
    def paths(self) -> list[list[int]]:
        """For each example, in the order of `rows`, the positions of all its tokens in the packed sequence."""
        starts = [0, *accumulate(self.lengths)]
        continued = set(self.parents)
        paths: list[list[int]] = []
        for leaf in (segment for segment in range(len(self.lengths)) if segment not in continued):
            path, at = list[int](), leaf
            while at != NO_PARENT:
                path[:0] = range(starts[at], starts[at + 1])
                at = self.parents[at]
            paths.append(path)
        return paths

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids_1T=self.input_ids_1T.to(device),
            position_ids_1T=self.position_ids_1T.to(device),
            predictor_N=self.predictor_N.to(device),
            target_N=self.target_N.to(device),
        )


class StepSampler:
    """The examples of every optimizer step: a seeded shuffle per epoch, cut into steps; an epoch's last step may be smaller.

    `max_steps` overrides `epochs` (as in the Hugging Face trainer): fewer steps, or more epochs.
    With `families` (trees.py), examples with a shared prefix come in one step: whole families are shuffled, and larger ones are split at
    random into pieces of one step. A step then has `examples_per_step` examples, give or take one family.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        examples_per_step: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
        families: Sequence[Sequence[int]] | None = None,
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
        self.share_prefixes = families is not None  # whether the examples of a step are packed as trees
        self._families = None if families is None else [np.asarray(family) for family in families]
        self._steps_of_epoch: tuple[int, list[list[int]]] | None = None  # of the last epoch; recomputed, never saved

    def __len__(self) -> int:
        """Number of optimizer steps."""
        return self.num_steps

    def rows_of_step(self, step: int) -> list[int]:
        """Return the example indices of step `step`, counted from 0. Raises IndexError outside `range(len(self))`."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside 0 to {self.num_steps - 1}")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self._steps_of_epoch is None or self._steps_of_epoch[0] != epoch:
            self._steps_of_epoch = (epoch, self._steps(epoch))
        return self._steps_of_epoch[1][step_of_epoch]

    def _steps(self, epoch: int) -> list[list[int]]:
        purpose = int.from_bytes(b"order", "big")  # keeps this stream apart from other users of the same seed
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, purpose, epoch])))
        size = self.examples_per_step
        if self._families is None:
            order = generator.permutation(self.num_examples)
            return [order[start : start + size].tolist() for start in range(0, self.num_examples, size)]
        shuffled = [generator.permutation(family) for family in self._families]
        pieces = [family[start : start + size] for family in shuffled for start in range(0, len(family), size)]
        steps: list[list[int]] = [[] for _ in range(self.steps_per_epoch)]
        last = -1
        for index in generator.permutation(len(pieces)):
            last += len(pieces[index])
            steps[last // size] += pieces[index].tolist()  # no piece is longer than a step, so no step stays empty
        return steps


def sampler_of(
    examples: TokenizedRows,
    *,
    examples_per_step: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    share_prefixes: bool,
) -> StepSampler:
    """Return the sampler of these examples; with `share_prefixes`, examples with a shared prefix stay together."""
    num_examples = len(examples.lengths)
    together = None
    if share_prefixes:
        together = families(grow(examples, range(num_examples)), examples_per_step=examples_per_step)
    return StepSampler(
        num_examples,
        examples_per_step=examples_per_step,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        families=together,
    )


def make_batches(
    examples: TokenizedRows, rows: Sequence[int], *, micro_batch_tokens: int, share_prefixes: bool = False
) -> list[Batch]:
    """Pack the examples of one step into few, evenly filled micro-batches of at most `micro_batch_tokens` tokens each.

    With `share_prefixes`, a shared prefix is in a micro-batch once; a tree that is too large is split and its trunk repeated.
    A single longer example is a batch of its own. The largest batch comes last, when all gradients exist: there the memory of
    a step peaks and is measured.
    Deterministic; raises ValueError when `micro_batch_tokens` is below 1.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens: expected a whole number above 0, got {micro_batch_tokens}")
    if share_prefixes:
        pieces = list(grow(examples, rows).pieces(micro_batch_tokens))
    else:
        pieces = [Piece([row], int(examples.lengths[row])) for row in rows]
    sizes = {piece.rows[0]: piece.num_tokens for piece in pieces}
    by_first = {piece.rows[0]: piece.rows for piece in pieces}
    too_long = [[first] for first in by_first if sizes[first] > micro_batch_tokens]
    fitting = [first for first in by_first if sizes[first] <= micro_batch_tokens]
    groups = [
        sorted(row for first in group for row in by_first[first])
        for group in too_long + _split_evenly(fitting, sizes, micro_batch_tokens)
    ]
    if share_prefixes:
        groups = [part for group in groups for part in _within(examples, group, micro_batch_tokens)]
    groups.sort(key=lambda group: (_num_tokens(examples, group, share_prefixes=share_prefixes), group))
    if share_prefixes:
        return [pack_trees(examples, group) for group in groups]
    return [pack_batch([examples.encoded(row) for row in group], group) for group in groups]


def step_with_largest_batch(
    examples: TokenizedRows, sampler: StepSampler, micro_batch_tokens: int, *, first: int
) -> int:
    """Return the step with the largest packed sequence, judged by lengths alone: a step of many tokens fills its micro-batches."""
    tokens = {
        step: _num_tokens(examples, sampler.rows_of_step(step), share_prefixes=sampler.share_prefixes)
        for step in range(first, len(sampler))
    }
    full = [step for step, total in tokens.items() if total >= micro_batch_tokens]
    if not full:
        return max(tokens, key=lambda step: tokens[step], default=first)
    # Even split of `total` into ceil(total / limit) micro-batches: the step with the fullest ones.
    return max(full, key=lambda step: tokens[step] / math.ceil(tokens[step] / micro_batch_tokens))


def largest_step(examples: TokenizedRows, sampler: StepSampler, micro_batch_tokens: int, *, first: int) -> list[Batch]:
    """Return the micro-batches of that step, chosen among steps from `first` on; the largest comes last."""
    step = step_with_largest_batch(examples, sampler, micro_batch_tokens, first=first)
    rows = sampler.rows_of_step(step)
    return make_batches(examples, rows, micro_batch_tokens=micro_batch_tokens, share_prefixes=sampler.share_prefixes)


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
        parents=(NO_PARENT,) * len(encoded),
        predictor_N=predictor_N,
        target_N=input_ids_1T[0, predictor_N + 1],
        rows=tuple(rows),
    )


def pack_trees(examples: TokenizedRows, rows: Sequence[int]) -> Batch:
    """As `pack_batch`, but with each shared prefix once, followed by the own tokens of each example."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    packed: list[int] = []

    def add(encoded: Encoded, start: int, end: int, parent: int) -> int:
        """Append the segment of tokens [start, end) of an example -> its number."""
        input_ids.extend(encoded.input_ids[start:end])
        position_ids.extend(range(start, end))
        lengths.append(end - start)
        parents.append(parent)
        return len(lengths) - 1

    def visit(node: Node, parent: int, last: int) -> None:
        """Append a node and everything below it; `last` is the position of the token before the node's first one."""
        if node.end > node.start:
            parent = add(examples.encoded(next(node.all_rows())), node.start, node.end, parent)
            last = len(input_ids) - 1
        for row in node.rows:
            encoded, first = examples.encoded(row), len(input_ids)
            add(encoded, node.end, len(encoded.input_ids), parent)
            places = [last if at < node.end else first + at - node.end for at in encoded.predictors]
            predictors.extend(places)
            targets.extend(encoded.input_ids[at + 1] for at in encoded.predictors)
            packed.append(row)
        for child in node.nodes:
            visit(child, parent, last)

    visit(grow(examples, rows).top, NO_PARENT, -1)
    return Batch(
        input_ids_1T=torch.tensor([input_ids], dtype=torch.int64),
        position_ids_1T=torch.tensor([position_ids], dtype=torch.int64),
        lengths=tuple(lengths),
        parents=tuple(parents),
        predictor_N=torch.tensor(predictors, dtype=torch.int64),
        target_N=torch.tensor(targets, dtype=torch.int64),
        rows=tuple(packed),
    )


def _within(examples: TokenizedRows, rows: list[int], capacity: int) -> list[list[int]]:
    """Return `rows`, halved until they fit: fewer examples may branch elsewhere than the whole step and need a few more tokens."""
    if len(rows) == 1 or _num_tokens(examples, rows) <= capacity:
        return [rows]
    middle = len(rows) // 2
    return [*_within(examples, rows[:middle], capacity), *_within(examples, rows[middle:], capacity)]


def _num_tokens(examples: TokenizedRows, rows: Sequence[int], *, share_prefixes: bool = True) -> int:
    if len(rows) == 1 or not share_prefixes:
        return int(examples.lengths[list(rows)].sum())
    return grow(examples, rows).num_tokens


def _split_evenly(rows: list[int], lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """Split into the groups of first-fit decreasing (at most 11/9 of the optimum), or into fewer if an even split fits.

    For each number of groups, from the lower bound up, try the even split (longest first into the emptiest group).
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
