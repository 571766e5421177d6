"""Prefix trees: shared prefixes of examples, found from the tokens alone. `rows` are indices of examples here.

    examples      passage question 1 answer | passage question 2 answer | header example ...
    tree          a node for each run of tokens shared by several examples; its children are the nodes and examples that continue it

Only tokens before the first label of an example are shared: a label belongs to its own example. The first token of a branch is predicted
from the last token of its parent. A run of fewer than LEAST_SHARED tokens is not worth a branch: its examples repeat it.

Examples are sorted by their prompts; the lengths of the common prefixes of neighbours determine the tree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from qlora_lite.data.template import Encoded

LEAST_SHARED = 16  # tokens
OFTEN = 4  # examples of a random step, on average, above which sharing is left to chance
MOST_LEVELS = 32  # of nested branches; deeper shared runs are repeated


class TokenizedRows(Protocol):
    """The part of `Examples` that batching needs."""

    @property
    def lengths(self) -> np.ndarray: ...  # int [num examples]: tokens per example

    def encoded(self, index: int) -> Encoded: ...


@dataclass(frozen=True)
class Node:
    """Tokens [start, end) of every example below it; the examples in `rows` continue alone."""

    start: int
    end: int
    nodes: tuple["Node", ...]
    rows: tuple[int, ...]

    def all_nodes(self) -> Iterator["Node"]:
        yield self
        for node in self.nodes:
            yield from node.all_nodes()

    def all_rows(self) -> Iterator[int]:
        for node in self.nodes:
            yield from node.all_rows()
        yield from self.rows


@dataclass(frozen=True)
class Piece:
    """Examples that stay in one micro-batch, and their tokens there."""

    rows: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Forest:
    """Trees, and examples without a shared prefix, under a top Node without tokens."""

    top: Node
    lengths: dict[int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens with every shared run once."""
        return tokens_of(self.top, self.lengths)

    @property
    def num_alone(self) -> int:
        """Tokens of the separate examples."""
        return sum(self.lengths.values())

    def pieces(self, capacity: int) -> Iterator[Piece]:
        """Yield trees, or parts of trees that fit `capacity` tokens, and examples without a shared prefix."""
        yield from (Piece([row], self.lengths[row]) for row in self.top.rows)
        for node in self.top.nodes:
            yield from split(node, self.lengths, capacity)


def grow(examples: TokenizedRows, rows: Sequence[int]) -> Forest:
    """Build the trees of these examples."""
    prompts = {row: _prompt(examples.encoded(row)) for row in rows}
    order = sorted(rows, key=lambda row: (prompts[row].tobytes(), row))
    common = [_num_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    return Forest(Node(0, 0, *_grow(order, common, 0)), {row: int(examples.lengths[row]) for row in rows})


@dataclass(frozen=True)
class Sharing:
    """The saving from packing the examples of steps as trees, and the average example of such a tree."""

    num_alone: int  # tokens of all examples
    num_packed: int  # tokens with the shared prefixes of a step once
    trunk: int  # shared tokens of an average example
    branch: int  # its own tokens
    num_labels: int  # its label tokens
    num_rows: int = 1  # examples
    steps: tuple[Forest, ...] = ()  # the forests of the summed steps
    longest_row: int = 0  # tokens of the longest example
    most_elsewhere: int = 0  # largest number of tokens in any other step
    most_rows_elsewhere: int = 0  # largest number of examples in any other step

    @property
    def factor(self) -> float:
        """Tokens of the separate examples, divided by the packed tokens."""
        return self.num_alone / self.num_packed

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens in a step; 0 without steps."""
        of_steps = [forest.num_tokens for forest in self.steps]
        return max(*of_steps, self.most_elsewhere) if of_steps else 0

    @property
    def most_rows(self) -> int:
        """Largest number of examples in a step; 0 without steps."""
        of_steps = [len(forest.lengths) for forest in self.steps]
        return max(*of_steps, self.most_rows_elsewhere) if of_steps else 0

    @property
    def rows_per_trunk(self) -> float:
        """Average number of examples per trunk: the trunk divided by an example's share of it."""
        own_part = self.num_packed / self.num_rows - self.branch
        return max(1.0, self.trunk / own_part) if own_part > 0 else float(self.num_rows)

    def to_json_dict(self) -> dict[str, float]:
        return {
            "tokens_alone": self.num_alone,
            "tokens_packed": self.num_packed,
            "factor": self.factor,
            "trunk_tokens": self.trunk,
            "branch_tokens": self.branch,
            "rows_per_trunk": self.rows_per_trunk,
        }

    def repeated(self, micro_batch_tokens: int) -> float:
        """Return the factor on the packed tokens when trees are cut to fit micro-batches of this size; 1.0 without cuts."""
        if not self.steps:
            return 1.0
        num_cut = sum(piece.num_tokens for forest in self.steps for piece in forest.pieces(micro_batch_tokens))
        return max(1.0, num_cut / self.num_packed)


def sharing(
    examples: TokenizedRows, steps: Iterable[Sequence[int]], *, others: Iterable[Sequence[int]] = ()
) -> Sharing:
    """Measure the sharing in `steps`, each given by its examples. Of `others` it uses only the sizes, as if nothing were shared."""
    num_alone = num_packed = num_shared = num_labels = num_rows = 0
    forests: list[Forest] = []
    for rows in steps:
        forest = grow(examples, rows)
        forests.append(forest)
        num_alone, num_packed, num_rows = (
            num_alone + forest.num_alone,
            num_packed + forest.num_tokens,
            num_rows + len(rows),
        )
        num_shared += sum(node.end * len(node.rows) for node in forest.top.all_nodes())
        num_labels += sum(end - start for row in rows for start, end in examples.encoded(row).spans)
    trunk, length, labels = (round(total / num_rows) for total in (num_shared, num_alone, num_labels))
    sizes = [(int(examples.lengths[list(rows)].sum()), len(rows)) for rows in others]
    return Sharing(
        num_alone,
        num_packed,
        trunk,
        max(1, length - trunk),
        max(1, labels),
        num_rows,
        steps=tuple(forests),
        longest_row=int(examples.lengths.max()),
        most_elsewhere=max((tokens for tokens, _ in sizes), default=0),
        most_rows_elsewhere=max((count for _, count in sizes), default=0),
    )


def families(forest: Forest, *, examples_per_step: int) -> list[list[int]]:
    """Group all examples into families that should come in one step: the largest trees that fit a step, and the rest of larger ones.

    A prefix shared by several examples of any random step (a system prompt) makes no family: they share it anyway.
    """
    num_rows = len(forest.lengths)
    groups: list[list[int]] = []

    def visit(node: Node) -> None:
        rows = list(node.all_rows())
        if node.end > node.start and len(rows) <= examples_per_step:
            groups.append(rows)
            return
        for child in node.nodes:
            visit(child)
        if node.end == node.start or len(rows) * examples_per_step >= OFTEN * num_rows:
            groups.extend([row] for row in node.rows)
        elif node.rows:
            groups.append(list(node.rows))

    visit(forest.top)
    return groups


def tokens_of(node: Node, lengths: dict[int, int]) -> int:
    """Return the tokens of a node and everything below it."""
    own = sum(lengths[row] - node.end for row in node.rows)
    return node.end - node.start + own + sum(tokens_of(child, lengths) for child in node.nodes)


def split(node: Node, lengths: dict[int, int], capacity: int, *, above: int = 0) -> Iterator[Piece]:
    """Yield pieces of at most `capacity` tokens, each with `above` and the node's own tokens; a single example may be longer."""
    whole = above + tokens_of(node, lengths)
    if whole <= capacity:
        yield Piece(list(node.all_rows()), whole)
        return
    base = above + node.end - node.start
    rows, taken = list[int](), base
    parts: list[tuple[int, list[int], Node | None]] = [
        (tokens_of(child, lengths), list(child.all_rows()), child) for child in node.nodes
    ]
    parts += [(lengths[row] - node.end, [row], None) for row in node.rows]
    for size, some, child in parts:
        if base + size > capacity and child is not None:
            yield from split(child, lengths, capacity, above=base)
            continue
        if taken + size > capacity and rows:
            yield Piece(rows, taken)
            rows, taken = [], base
        rows.extend(some)
        taken += size
    if rows:
        yield Piece(rows, taken)


def _grow(
    order: Sequence[int], common: Sequence[int], start: int, levels: int = MOST_LEVELS
) -> tuple[tuple[Node, ...], tuple[int, ...]]:
    """-> (nodes, single examples) of sorted examples whose neighbours have `common` tokens in common, `start` of them above."""
    cuts = [index + 1 for index, length in enumerate(common) if length < start + LEAST_SHARED]
    edges = [0, *cuts, len(order)]
    nodes: list[Node] = []
    rows: list[int] = []
    for low, high in pairwise(edges):
        if high - low == 1 or not levels:
            rows += order[low:high]
            continue
        inside = common[low : high - 1]
        end = min(inside)
        nodes.append(Node(start, end, *_grow(order[low:high], inside, end, levels - 1)))
    return tuple(nodes), tuple(rows)


def _prompt(encoded: Encoded) -> np.ndarray:
    """Return the tokens before the first label, big-endian: their bytes sort like the tokens."""
    return np.array(encoded.input_ids[: encoded.spans[0][0]], dtype=">u4")


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
