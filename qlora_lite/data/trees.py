"""Prefix trees: what examples share at their beginning, found from the tokens alone.

    rows          passage question 1 answer | passage question 2 answer | header example ...
    tree          a node for each run of tokens that several rows begin with, its children the nodes and rows that go on from there

Only tokens before the first label of a row are shared: a label belongs to its own example. The first token of a branch is predicted from
the last token of its parent, wherever it branches. A run of fewer than LEAST_SHARED tokens is not worth a branch: its rows repeat it.

Rows are sorted by their prompts; of neighbours, the lengths of the common beginnings are the whole tree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from qlora_lite.data.template import Encoded

LEAST_SHARED = 16  # tokens
OFTEN = 4  # rows of a random step, on average, from which on it is left to chance that they share
MOST_LEVELS = 32  # of branches from branches; what is shared deeper down is repeated


class TokenizedRows(Protocol):
    """What batching needs to know of `Examples`."""

    @property
    def lengths(self) -> np.ndarray: ...  # int [num examples]: tokens per example

    def encoded(self, index: int) -> Encoded: ...


@dataclass(frozen=True)
class Node:
    """Tokens [start, end) of every row below it; the rows in `rows` go on by themselves."""

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
    """Rows that stay in one micro-batch, and the tokens that they take there."""

    rows: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Forest:
    """Trees, and rows that share nothing: a Node without tokens at the top."""

    top: Node
    lengths: dict[int, int]

    @property
    def num_tokens(self) -> int:
        """With every shared run once."""
        return tokens_of(self.top, self.lengths)

    @property
    def num_alone(self) -> int:
        """With every run as often as rows have it."""
        return sum(self.lengths.values())

    def pieces(self, capacity: int) -> Iterator[Piece]:
        """Trees, or the parts of one that fit `capacity` tokens, and rows that share nothing."""
        yield from (Piece([row], self.lengths[row]) for row in self.top.rows)
        for node in self.top.nodes:
            yield from split(node, self.lengths, capacity)


def grow(examples: TokenizedRows, rows: Sequence[int]) -> Forest:
    """The trees of these rows."""
    prompts = {row: _prompt(examples.encoded(row)) for row in rows}
    order = sorted(rows, key=lambda row: (prompts[row].tobytes(), row))
    common = [_num_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    return Forest(Node(0, 0, *_grow(order, common, 0)), {row: int(examples.lengths[row]) for row in rows})


@dataclass(frozen=True)
class Sharing:
    """What packing the rows of steps as trees saves, and what a row of such a tree is like on average."""

    num_alone: int  # tokens of all rows
    num_packed: int  # with what rows of a step share once
    trunk: int  # tokens that a row shares
    branch: int  # tokens of its own
    num_labels: int  # of these
    num_rows: int = 1
    steps: tuple[Forest, ...] = ()  # that these are the sums of
    longest_row: int = 0  # tokens
    most_elsewhere: int = 0  # tokens of a step that is not one of these, at most
    most_rows_elsewhere: int = 0

    @property
    def factor(self) -> float:
        """How many times as many tokens the rows have by themselves."""
        return self.num_alone / self.num_packed

    @property
    def most_tokens(self) -> int:
        """Of a step, at most; 0 where none was looked at."""
        of_steps = [forest.num_tokens for forest in self.steps]
        return max(*of_steps, self.most_elsewhere) if of_steps else 0

    @property
    def most_rows(self) -> int:
        """Of a step; 0 where none was looked at."""
        of_steps = [len(forest.lengths) for forest in self.steps]
        return max(*of_steps, self.most_rows_elsewhere) if of_steps else 0

    @property
    def rows_per_trunk(self) -> float:
        """On average: of a row's tokens, what it computes of its trunk beside its own."""
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
        """How many times as many tokens are computed where trees must be cut to fit micro-batches of so many; 1.0 where none is."""
        if not self.steps:
            return 1.0
        num_cut = sum(piece.num_tokens for forest in self.steps for piece in forest.pieces(micro_batch_tokens))
        return max(1.0, num_cut / self.num_packed)


def sharing(
    examples: TokenizedRows, steps: Iterable[Sequence[int]], *, others: Iterable[Sequence[int]] = ()
) -> Sharing:
    """Of steps with these rows each. Of `others` only the sizes are looked at, as if their rows shared nothing."""
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
    """All rows, those together that should come in one step: the largest trees that a step holds, and of larger ones the rest.

    What so many rows share that any random step has several of them (a system prompt) makes no family: they share it anyway.
    """
    num_rows = len(forest.lengths)
    found: list[list[int]] = []

    def visit(node: Node) -> None:
        rows = list(node.all_rows())
        if node.end > node.start and len(rows) <= examples_per_step:
            found.append(rows)
            return
        for child in node.nodes:
            visit(child)
        if node.end == node.start or len(rows) * examples_per_step >= OFTEN * num_rows:
            found.extend([row] for row in node.rows)
        elif node.rows:
            found.append(list(node.rows))

    visit(forest.top)
    return found


def tokens_of(node: Node, lengths: dict[int, int]) -> int:
    """Of a node, all that lies below it, and nothing above."""
    own = sum(lengths[row] - node.end for row in node.rows)
    return node.end - node.start + own + sum(tokens_of(child, lengths) for child in node.nodes)


def split(node: Node, lengths: dict[int, int], capacity: int, *, above: int = 0) -> Iterator[Piece]:
    """Pieces of at most `capacity` tokens, each with `above` and the node's own tokens; one row may be longer by itself."""
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
    """-> (nodes, rows by themselves) of sorted rows whose neighbours have so many tokens in common; `start` of them are above."""
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
    """The tokens before the first label, so that their bytes are in the order of the tokens."""
    return np.array(encoded.input_ids[: encoded.spans[0][0]], dtype=">u4")


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
