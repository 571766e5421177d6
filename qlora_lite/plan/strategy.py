"""How a step is computed so that it fits: the fastest of all ways that stay within the budget, and the leaner ones after it.

In: what the recipe leaves free, and a function that rehearses one way. Out: `Choice`, with how much slower than the fastest it is.

    slowdown = (F + R / k) / F  *  (1 + C / tokens) / (1 + C / most tokens)  *  S

F is the operations a weight and token of a step without recomputation, in pairs: forward, gradient of the input and, where the weight is
trained, of the weight (2 or 3); R = 1 the forward pass again, in one layer of k. C is what making a 16-bit weight of a 4-bit one costs,
in tokens of its matrix product: on a card 4.5 bytes moved a weight against 2 operations a token, by the card's rates (an RTX 4090's
165 TFLOP/s and 1 TB/s: 370); on a CPU 115, which tools/bench_ways found with the small shipped model: nine ways, whose times scatter by
6% about the formula (tools/results/bench_ways.json). A card's is not measured yet. S is how many times as many tokens are computed where
prefix trees must be cut to fit such micro-batches, counted on the data (1 where nothing is shared).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qlora_lite.device.card import Card
from qlora_lite.evaluation.generate import BATCH_TOKENS
from qlora_lite.model.head import CHUNK
from qlora_lite.training.footprint import Footprint

CPU_MICRO_BATCH_TOKENS, CARD_MICRO_BATCH_TOKENS = (
    2048,
    4096,
)  # enough to hide dequantizing the weights behind the products
CHECKPOINTING = (0, 2, 1)  # every so many-th layer, from fastest to leanest
HEAD_CHUNKS = (CHUNK, 64, 16)
EVAL_BATCH_TOKENS = (BATCH_TOKENS, 2048, 1024, 512, 256)
OPTIMIZERS = ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")
_CPU_DEQUANTIZING_TOKENS, _DEQUANTIZING_BYTES = (
    115,
    4.5,
)  # bytes moved a weight: half a byte read, two written, two read again


@dataclass(frozen=True)
class Free:
    """What a recipe fixes; None is free to choose."""

    checkpoint_every: int | None = None
    micro_batch_tokens: int | None = None
    head_chunk: int | None = None
    optimizer: str | None = None
    eval_batch_tokens: int | None = None


@dataclass(frozen=True)
class Strategy:
    """One way of computing a step."""

    footprint: Footprint
    optimizer: str
    slowdown: float  # 1.0 is the fastest of those that were free to choose

    def is_as_lean_as(self, other: "Strategy") -> bool:
        """In every respect, so that it cannot need more memory."""
        mine, theirs = self._leanness(), other._leanness()
        return all(a >= b for a, b in zip(mine, theirs, strict=True))

    def _leanness(self) -> tuple[float, ...]:
        footprint = self.footprint
        return (
            _recomputed(footprint.checkpoint_every),
            -footprint.micro_batch_tokens,
            -footprint.head_chunk,
            OPTIMIZERS.index(self.optimizer),
        )


@dataclass(frozen=True)
class Choice:
    """The first strategy that fits, or the leanest where none does; `tried` has the peak of every one that was rehearsed."""

    strategy: Strategy
    fits: bool
    tried: dict[Strategy, int]

    @property
    def peak_bytes(self) -> int:
        return self.tried[self.strategy]


def strategies(
    free: Free, *, card: Card, method: str, length: int, repeated: Callable[[int], float] = lambda tokens: 1.0
) -> tuple[Strategy, ...]:
    """All that the recipe allows, from fastest to leanest. `length` is the longest example in tokens; `repeated` is S of the formula."""
    tokens, cost = _token_choices(free, card, length), dequantizing_tokens(card, method)
    repeats = {t: repeated(t) for t in tokens}
    found = [
        Strategy(
            Footprint(t, every, chunk),
            optimizer,
            repeats[t] * slowdown(every, t, tokens[0], cost=cost, method=method),
        )
        for chunk in _choices(free.head_chunk, HEAD_CHUNKS)
        for every in _choices(free.checkpoint_every, CHECKPOINTING)
        for t in tokens
        for optimizer in _choices(free.optimizer, OPTIMIZERS)
    ]
    fastest = min(strategy.slowdown for strategy in found)
    found = [replace(strategy, slowdown=strategy.slowdown / fastest) for strategy in found]
    # A smaller chunk of the head saves little and is the last resort.
    return tuple(sorted(found, key=lambda s: (-s.footprint.head_chunk, s.slowdown, OPTIMIZERS.index(s.optimizer))))


def choose(ways: Sequence[Strategy], peak_bytes: Callable[[Strategy], int], *, budget_bytes: int) -> Choice:
    """The first of `ways` whose peak is within the budget. A smaller budget never gives one that needs more: the order is fixed.

    One that cannot fit, because another that is as lean in every respect does not, is not rehearsed.
    """
    tried: dict[Strategy, int] = {}
    leanest = next(way for way in ways if all(way.is_as_lean_as(other) for other in ways))

    def fits(way: Strategy) -> bool:
        if any(tried[other] > budget_bytes and other.is_as_lean_as(way) for other in tried):
            return False
        if way not in tried:
            tried[way] = peak_bytes(way)
        return tried[way] <= budget_bytes

    if not fits(leanest):
        return Choice(leanest, fits=False, tried=tried)
    for way in ways:
        lean_kin = _leanest_with(way.footprint.checkpoint_every, ways)
        if fits(lean_kin) and fits(way):
            return Choice(way, fits=True, tried=tried)
    raise AssertionError("the leanest fits and is one of them")


def next_leaner(free: Free, *, length: int) -> Callable[[Footprint], Footprint | None]:
    """For a run that has no memory left: what to change next, of what the recipe leaves free; None when that is all."""

    def leaner(now: Footprint) -> Footprint | None:
        if free.checkpoint_every is None and now.checkpoint_every != CHECKPOINTING[-1]:
            return replace(now, checkpoint_every=CHECKPOINTING[CHECKPOINTING.index(now.checkpoint_every) + 1])
        if free.micro_batch_tokens is None and now.micro_batch_tokens > length:
            return replace(now, micro_batch_tokens=max(length, now.micro_batch_tokens // 2))
        smaller = [chunk for chunk in HEAD_CHUNKS if chunk < now.head_chunk]
        return replace(now, head_chunk=smaller[0]) if free.head_chunk is None and smaller else None

    return leaner


def _leanest_with(checkpoint_every: int, ways: Sequence[Strategy]) -> Strategy:
    kin = [way for way in ways if way.footprint.checkpoint_every == checkpoint_every]
    return next(way for way in kin if all(way.is_as_lean_as(other) for other in kin))


def _choices(asked: "int | str | None", all_of_them: tuple) -> tuple:  # type: ignore[type-arg]
    return all_of_them if asked is None else (asked,)


def _token_choices(free: Free, card: Card, length: int) -> tuple[int, ...]:
    if free.micro_batch_tokens is not None:
        return (free.micro_batch_tokens,)
    most = CPU_MICRO_BATCH_TOKENS if card.is_cpu else CARD_MICRO_BATCH_TOKENS
    return tuple(_halves(max(most, length), length))


def _halves(most: int, least: int) -> Iterator[int]:
    while most > least:
        yield most
        most //= 2
    yield least


def _recomputed(every: int) -> float:
    """Share of the layers."""
    return 1 / every if every else 0.0


def slowdown(every: int, tokens: int, most_tokens: int, *, cost: float, method: str) -> float:
    """Time of a step against one without recomputing in micro-batches of `most_tokens`; `cost` is C."""
    pairs = 3 if method == "full" else 2
    recomputing = (pairs + _recomputed(every)) / pairs
    return recomputing * (1 + cost / tokens) / (1 + cost / most_tokens)


def dequantizing_tokens(card: Card, method: str) -> float:
    """C of the formula; nothing is dequantized where the weights have 16 bits."""
    if method != "qlora":
        return 0
    return _CPU_DEQUANTIZING_TOKENS if card.is_cpu else _DEQUANTIZING_BYTES * card.flops / (2 * card.bytes_per_s)
