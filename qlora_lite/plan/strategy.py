"""Strategies to compute a step: the fastest one within the budget, and the leaner ones after it.

In: the recipe's free settings, and a function that rehearses one strategy. Out: `Choice`, with its slowdown relative to the fastest.

    slowdown = (F + R / k) / F  *  (1 + C / tokens) / (1 + C / most tokens)  *  S

F is the number of operation pairs per weight and token without recomputation: forward, gradient of the input and, for trained weights,
of the weight (2 or 3). R = 1 is the recomputed forward pass, in one layer of k. C is the cost of dequantizing a 4-bit weight to 16 bits,
in tokens of its matrix product: on a card 4.5 bytes moved per weight against 2 operations per token, at the card's rates (an RTX 4090's
165 TFLOP/s and 1 TB/s: 370); on a CPU 115, fitted by tools/bench_ways on the small shipped model: nine strategies, whose times scatter
by 6% about the formula (tools/results/bench_ways.json). It is not measured on a card yet. S is the factor of repeated tokens when
micro-batches cut prefix trees, counted on the data (1 without sharing).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_lite.device.card import Card
from qlora_lite.evaluation.generate import BATCH_TOKENS
from qlora_lite.model.head import CHUNK
from qlora_lite.model.policy import Policy
from qlora_lite.training.footprint import Footprint

CPU_MICRO_BATCH_TOKENS, CARD_MICRO_BATCH_TOKENS = 2048, 4096  # enough to hide dequantizing behind the products
CHECKPOINTING = (0, 2, 1)  # n: every n-th layer, 0: none; from fastest to leanest
HEAD_CHUNKS = (CHUNK, 64, 16)
EVAL_BATCH_TOKENS = (BATCH_TOKENS, 2048, 1024, 512, 256)
OPTIMIZERS = ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")
_CPU_DEQUANTIZING_TOKENS = 115
_DEQUANTIZING_BYTES = 4.5  # moved per weight: half a byte read, two written, two read again


@dataclass(frozen=True)
class Free:
    """The recipe's settings; None is free to choose."""

    checkpoint_every: int | None = None
    micro_batch_tokens: int | None = None
    head_chunk: int | None = None
    optimizer: str | None = None
    eval_batch_tokens: int | None = None
    policy: tuple[tuple[str, Any], ...] = ()  # the fields of Policy that the recipe sets, with their values

    @property
    def asks_for_homes(self) -> bool:
        """Whether the recipe itself asks for chunks or other homes, which an ordinary step does not have."""
        return not Policy(**dict(self.policy)).is_plain


@dataclass(frozen=True)
class Strategy:
    """One way to compute a step."""

    footprint: Footprint
    optimizer: str
    slowdown: float  # 1.0 is the fastest of the allowed strategies

    def is_as_lean_as(self, other: "Strategy") -> bool:
        """Whether it is as lean in every respect, so that it cannot need more memory."""
        return all(a >= b for a, b in zip(self._leanness(), other._leanness(), strict=True))

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
    """The first strategy that fits, or the leanest if none fits; `tried` has the peak bytes of every rehearsed one."""

    strategy: Strategy
    fits: bool
    tried: dict[Strategy, int]

    @property
    def peak_bytes(self) -> int:
        return self.tried[self.strategy]


def strategies(
    free: Free, *, card: Card, method: str, length: int, repeated: Callable[[int], float] = lambda tokens: 1.0
) -> tuple[Strategy, ...]:
    """Return all allowed strategies, fastest first. `length` is the longest example in tokens; `repeated` is S of the formula."""
    tokens, cost = _token_choices(free, card, length), dequantizing_tokens(card, method)
    repeats = {t: repeated(t) for t in tokens}
    allowed = [
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
    fastest = min(strategy.slowdown for strategy in allowed)
    allowed = [replace(strategy, slowdown=strategy.slowdown / fastest) for strategy in allowed]
    # A smaller chunk of the head saves little, so it is the last resort.
    return tuple(sorted(allowed, key=lambda s: (-s.footprint.head_chunk, s.slowdown, OPTIMIZERS.index(s.optimizer))))


def choose(ways: Sequence[Strategy], peak_bytes: Callable[[Strategy], int], *, budget_bytes: int) -> Choice:
    """Return the first of `ways` whose peak fits the budget. The order is fixed, so a smaller budget never chooses a larger peak.

    Skips the rehearsal of a strategy if another one that is as lean in every respect does not fit.
    """
    tried: dict[Strategy, int] = {}
    leanest = next(way for way in ways if all(way.is_as_lean_as(other) for other in ways))

    def fits(way: Strategy) -> bool:
        if any(peak > budget_bytes and leaner.is_as_lean_as(way) for leaner, peak in tried.items()):
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


def next_leaner(
    free: Free, *, length: int, homes: Callable[[], Sequence[Strategy]] = tuple
) -> Callable[[Footprint], Footprint | None]:
    """Return a function for a run out of memory: footprint -> the next leaner one that the recipe allows; None if it is the leanest.

    After the ordinary footprints come those of `homes`, in their order (homes.py).
    """

    def leaner(now: Footprint) -> Footprint | None:
        following = ordinary(now) if now.policy.is_plain else None
        if following is not None:
            return following
        after = [way.footprint for way in homes()]
        kin = [place for place, footprint in enumerate(after) if _is_kind_of(now, footprint)]
        return next(iter(after[kin[-1] + 1 if kin else 0 :]), None)

    def ordinary(now: Footprint) -> Footprint | None:
        if free.checkpoint_every is None and now.checkpoint_every != CHECKPOINTING[-1]:
            return replace(now, checkpoint_every=CHECKPOINTING[CHECKPOINTING.index(now.checkpoint_every) + 1])
        if free.micro_batch_tokens is None and now.micro_batch_tokens > length:
            return replace(now, micro_batch_tokens=max(length, now.micro_batch_tokens // 2))
        smaller = [chunk for chunk in HEAD_CHUNKS if chunk < now.head_chunk]
        return replace(now, head_chunk=smaller[0]) if free.head_chunk is None and smaller else None

    return leaner


def _is_kind_of(footprint: Footprint, other: Footprint) -> bool:
    """Whether they differ at most in the number of resident layers."""
    resident = None if other.policy.resident_layers is None else footprint.policy.resident_layers
    return replace(other, policy=replace(other.policy, resident_layers=resident)) == footprint


def _leanest_with(checkpoint_every: int, ways: Sequence[Strategy]) -> Strategy:
    kin = [way for way in ways if way.footprint.checkpoint_every == checkpoint_every]
    return next(way for way in kin if all(way.is_as_lean_as(other) for other in kin))


def _choices(asked: "int | str | None", choices: tuple) -> tuple:  # type: ignore[type-arg]
    return choices if asked is None else (asked,)


def _token_choices(free: Free, card: Card, length: int) -> tuple[int, ...]:
    """Return halves of the largest number of tokens, down to the longest example."""
    if free.micro_batch_tokens is not None:
        return (free.micro_batch_tokens,)
    largest = CPU_MICRO_BATCH_TOKENS if card.is_cpu else CARD_MICRO_BATCH_TOKENS
    choices = [max(largest, length)]
    while choices[-1] > length:
        choices.append(max(choices[-1] // 2, length))
    return tuple(choices)


def _recomputed(every: int) -> float:
    """Return the share of recomputed layers."""
    return 1 / every if every else 0.0


def slowdown(every: int, tokens: int, most_tokens: int, *, cost: float, method: str) -> float:
    """Return the time of a step relative to one without recomputation in micro-batches of `most_tokens`; `cost` is C."""
    pairs = 3 if method == "full" else 2
    recomputing = (pairs + _recomputed(every)) / pairs
    return recomputing * (1 + cost / tokens) / (1 + cost / most_tokens)


def dequantizing_tokens(card: Card, method: str) -> float:
    """Return C of the formula; 0 for 16-bit weights, which need no dequantizing."""
    if method != "qlora":
        return 0
    return _CPU_DEQUANTIZING_TOKENS if card.is_cpu else _DEQUANTIZING_BYTES * card.flops / (2 * card.bytes_per_s)
