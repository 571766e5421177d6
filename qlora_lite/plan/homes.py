"""Steps of models and sequences that do not fit the device: layers over chunks of tokens, and parts of the model elsewhere.

In: the recipe's free settings, card, config, length. Out: strategies from fastest to leanest, and the first that fits both budgets, the
device's and the host's. They come after those of strategy.py: each of them is as lean as possible in micro-batch and optimizer.

    time = max(arithmetic, weights' bytes / link) + other copies / link

Arithmetic is counted in forward passes over the layers: one forward, one recomputed, one backward; `fewest` adds one, and chunks add the
keys and values of one. Weights are copied while others compute, once a pass over the layers. Layer inputs, and keys and values on the
host, are copied between computations. Rates are the card's; products are assumed to reach PRODUCT_SHARE of its peak. Nothing of this is
measured on a card yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from transformers import PreTrainedConfig

from qlora_lite.base.skeleton import model_class
from qlora_lite.device.card import Card
from qlora_lite.model.attention import packs_rows
from qlora_lite.model.chunk_attention import KEY_BLOCK
from qlora_lite.model.head import CHUNK
from qlora_lite.model.policy import PLAIN, LayerInputs, Policy
from qlora_lite.plan.fits import STEP
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, Settings
from qlora_lite.plan.strategy import (
    CARD_MICRO_BATCH_TOKENS,
    CPU_MICRO_BATCH_TOKENS,
    OPTIMIZERS,
    Choice,
    Free,
    Strategy,
    dequantizing_tokens,
    slowdown,
)
from qlora_lite.training.footprint import Footprint

CHUNKS = (8192, 4096, 2048, 1024)  # tokens; fewer make products too small to be fast
LEAST_HEAD_CHUNK = 16
PRODUCT_SHARE = 0.6  # of the card's peak rate that products reach: assumed
_DISK_BYTES_PER_S = 2e9  # of a stream from the base's files: assumed, a plain NVMe
_NO_LIMIT = 2**24  # tokens
_LONG = 2**16  # tokens


@dataclass(frozen=True)
class Budgets:
    """Bytes that a run may hold on the device and in host memory."""

    device: int
    host: int
    is_one_memory: bool = False  # a CPU: parts "on the host" are in the device's memory

    def fit(self, rehearsal: Rehearsal) -> bool:
        if self.is_one_memory:
            return rehearsal.peak_bytes + rehearsal.homes_bytes <= self.device
        return rehearsal.peak_bytes <= self.device and rehearsal.homes_bytes <= self.host


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that copies and arithmetic depend on."""

    num_layers: int
    hidden: int
    key_width: int  # of keys of one token, all heads
    layer_weights: int
    layer_bytes: int  # of its stored weights

    @staticmethod
    def of(config: PreTrainedConfig, num_weights: int, bytes_a_weight: float) -> "Shape":
        ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        weights = max(1, (num_weights - ends) // config.num_hidden_layers)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return Shape(
            config.num_hidden_layers, config.hidden_size, key_heads * width, weights, int(weights * bytes_a_weight)
        )


def seconds(policy: Policy, shape: Shape, card: Card, tokens: int) -> float:
    """The estimated time of forward and backward of a sequence of `tokens` tokens, see above."""
    chunk = min(policy.chunk_tokens or tokens, tokens)
    is_chunked = chunk < tokens
    per_token = 2 * shape.layer_weights + 2 * tokens * shape.hidden  # half of the keys on average, scores and values
    keys_share = 2 * 2 * shape.hidden * shape.key_width / per_token
    passes = 3 + policy.keeps_fewest + (keys_share if is_chunked else 0)
    arithmetic = shape.num_layers * tokens * per_token * passes / (PRODUCT_SHARE * (card.flops or 1e11))
    link = card.link_bytes_per_s or 1e10
    streamed = 0 if policy.resident_layers is None else shape.num_layers - policy.resident_layers
    rate = link if policy.stream_from == "host" else min(link, _DISK_BYTES_PER_S)
    weights = streamed * shape.layer_bytes * (2 + policy.keeps_fewest) / rate
    inputs = 0.0
    if policy.inputs_home == "host":
        inputs = shape.num_layers * tokens * 2 * shape.hidden * (6 + 2 * policy.keeps_fewest) / link
    keys = 0.0
    if policy.keys_values == "host" and is_chunked:
        # Every chunk reads all earlier keys and values, and adds to their fp32 gradients.
        keys = shape.num_layers * tokens * (tokens / chunk / 2) * shape.key_width * (3 * 2 * 2 + 2 * 2 * 4) / link
    return max(arithmetic, weights) + inputs + keys


def relative_time(policy: Policy, shape: Shape, card: Card, tokens: int, *, method: str) -> float:
    """The estimated time of a step relative to the fastest ordinary one, whether or not that one fits."""
    chunk = min(policy.chunk_tokens or tokens, tokens)
    most = CPU_MICRO_BATCH_TOKENS if card.is_cpu else CARD_MICRO_BATCH_TOKENS
    dequantizing = slowdown(1, chunk, max(most, tokens), cost=dequantizing_tokens(card, method), method=method)
    return dequantizing * seconds(policy, shape, card, tokens) / seconds(PLAIN, shape, card, tokens)


def added_times(policy: Policy, shape: Shape, card: Card, tokens: int, *, method: str) -> dict[str, float]:
    """Shares of a step's time that each field of a policy adds, by the name of the field: those that differ from an ordinary step."""
    now = relative_time(policy, shape, card, tokens, method=method)
    changed = [field.name for field in fields(policy) if getattr(policy, field.name) != getattr(PLAIN, field.name)]
    without = {name: replace(policy, **{name: getattr(PLAIN, name)}) for name in changed}
    return {name: now / relative_time(other, shape, card, tokens, method=method) - 1 for name, other in without.items()}


def homes(
    free: Free, settings: Settings, *, config: PreTrainedConfig, shape: Shape, length: int, has_host: bool
) -> tuple[Strategy, ...]:
    """Return all strategies that the recipe allows, fastest first; none with method full, whose weights all change, and none for a
    recipe that keeps activations. Without `has_host`, nothing waits in host memory."""
    card, method = settings.card, settings.method
    if method == "full" or free.checkpoint_every not in (None, 1):
        return ()
    packs, ends_are_frozen = packs_rows(model_class(config)), not settings.modules_to_save

    def may_use(policy: Policy) -> bool:
        if policy.stream_from == "disk" and policy.resident_layers is not None and settings.use_dora:
            return False  # DoRA reads every weight at the start
        return has_host or free.asks_for_homes or not policy.uses_host

    asked = (replace(policy, **dict(free.policy)) for policy in _ladder(card, packs, length, ends_are_frozen))
    policies = [policy for policy in dict.fromkeys(asked) if not policy.is_plain and may_use(policy)]
    if not policies:
        return ()
    tokens, optimizer = free.micro_batch_tokens or length, free.optimizer or OPTIMIZERS[-1]
    ways = [
        Strategy(
            Footprint(tokens, 1, free.head_chunk or CHUNK, policy),
            optimizer,
            relative_time(policy, shape, card, tokens, method=method),
        )
        for policy in policies
    ]
    ways.sort(key=lambda way: way.slowdown)
    if free.head_chunk is None:  # saves little, so it is the last resort
        leanest = [way for way in ways if _leanness(way.footprint.policy) == _leanness(ways[-1].footprint.policy)]
        ways += [replace(way, footprint=replace(way.footprint, head_chunk=LEAST_HEAD_CHUNK)) for way in leanest]
    return tuple(ways)


def _leanness(policy: Policy) -> Policy:
    """The policy by what it leaves on the device: streams from host and disk leave the same."""
    return replace(policy, stream_from="host")


def _ladder(card: Card, packs: bool, length: int, ends_are_frozen: bool) -> list[Policy]:
    """Policies that make sense on the card, in no order. The CPU has one memory: there only chunks and fewer inputs save any."""
    chunks = [chunk for chunk in CHUNKS if chunk < length] if packs else []
    largest, smallest = (chunks[0], chunks[-1]) if chunks else (0, 0)
    middle = chunks[len(chunks) // 2] if chunks else 0
    on_device = [Policy(largest), Policy(largest, "fewest"), Policy(middle, "fewest"), Policy(smallest, "fewest")]
    if card.is_cpu:
        from_disk = [replace(policy, resident_layers=0, stream_from="disk") for policy in on_device]
        return [policy for policy in (*on_device, *from_disk) if not policy.is_plain]
    ends = Policy(embeddings="host", head="streamed") if ends_are_frozen else PLAIN
    embeddings = Policy(embeddings="host") if ends_are_frozen else PLAIN
    with_host = [
        replace(embeddings, chunk_tokens=largest, layer_inputs="host"),
        replace(embeddings, chunk_tokens=largest, layer_inputs="host_fewest"),
        replace(embeddings, chunk_tokens=middle, layer_inputs="host"),
        replace(embeddings, chunk_tokens=middle, layer_inputs="host_fewest"),
        replace(ends, chunk_tokens=largest),
    ]
    kinds: tuple[tuple[int, LayerInputs], ...] = (
        (largest, "device"), (largest, "host"), (largest, "host_fewest"), (largest, "fewest"), (middle, "host"),
        (middle, "host_fewest"), (smallest, "host_fewest"),
    )  # fmt: skip
    streamed = [replace(ends, chunk_tokens=chunk, layer_inputs=inputs, resident_layers=0) for chunk, inputs in kinds]
    last = replace(ends, chunk_tokens=smallest, layer_inputs="host_fewest", resident_layers=0)
    leanest = [replace(last, keys_values="host"), replace(last, keys_values="host", stream_from="disk")]
    return [policy for policy in (*on_device, *with_host, *streamed, *leanest) if not policy.is_plain]


def choose_homes(
    ways: Sequence[Strategy], rehearse: Callable[[Strategy, MicroBatch], Rehearsal], batch: MicroBatch, budgets: Budgets,
    *, num_layers: int, resident_is_free: bool,
) -> Choice:  # fmt: skip
    """Return the first of `ways` that fits both budgets, with as many resident layers as fit if their number is free; the last if none
    fits.

    A long sequence is estimated from two shorter ones, and a choice confirmed by its own rehearsal. The order is fixed, so smaller budgets
    never choose larger peaks.
    """
    tried: dict[Strategy, int] = {}
    for way in ways:
        estimate = _estimate(way, rehearse, batch)
        tried[way] = estimate.peak_bytes
        if not budgets.fit(estimate) and not _may_stream_fewer(way, estimate, budgets):
            continue
        if way.footprint.policy.resident_layers == 0 and resident_is_free:
            way = _with_residents(way, estimate, rehearse, batch, budgets, num_layers)
        whole = rehearse(way, batch)
        tried[way] = whole.peak_bytes
        if budgets.fit(whole):
            return Choice(way, fits=True, tried=tried)
    return Choice(ways[-1], fits=False, tried=tried)


def longest_of_all(
    ways: Sequence[Strategy], rehearse: Callable[[Strategy, MicroBatch], Rehearsal], label_share: float, budgets: Budgets,
    *, limit: int | None = None,
) -> tuple[Strategy, int] | None:  # fmt: skip
    """Return the strategy with the longest sequence and its length in multiples of STEP; None if not even STEP tokens fit with any.

    `limit` bounds the length; without, the model's positions do not.
    """
    about = {way: length_about(partial(rehearse, way), way.footprint.policy, label_share, budgets) for way in ways}
    best = max(ways, key=lambda way: about[way])
    most = (limit or _NO_LIMIT) // STEP

    def fits(way: Strategy, steps: int) -> bool:
        return budgets.fit(rehearse(way, MicroBatch(max(2, steps * STEP), 1, label_share)))

    if about[best] > 2 * KEY_BLOCK:
        steps = _largest(partial(fits, best), min(most, about[best] // STEP), most)
        return (best, steps * STEP) if steps else None
    short = {way: _largest(partial(fits, way), min(most, 16), min(most, 2 * KEY_BLOCK // STEP)) for way in ways}
    best = max(ways, key=lambda way: short[way])
    return (best, short[best] * STEP) if short[best] else None


def _largest(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number up to `most` that fits, to half a thousandth; 0 if none does. A long guess that fits is taken, because each try
    takes minutes, and a line through rehearsals is as exact."""
    if guess * STEP > _LONG and fits(guess):
        return guess
    low, high, width = 0, most + 1, max(1, guess // 200)
    while guess > low and guess < high:  # gallop from the guess until both sides are known
        if fits(guess):
            low, guess = guess, min(most, guess + width)
        else:
            high, guess = guess, max(0, guess - width)
        width *= 2
    while high - low > max(1, low // 2000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def length_about(
    rehearse: Callable[[MicroBatch], Rehearsal], policy: Policy, label_share: float, budgets: Budgets
) -> int:
    """The tokens at which a line through two rehearsed sequences meets the tighter budget; 0 if it never does."""
    near, far = _two_lengths(policy)
    low, high = (rehearse(MicroBatch(length, 1, label_share)) for length in (near, far))
    pairs = [
        (sum(parts.values()), sum(high.stretches[name].values()), budgets.device)
        for name, parts in low.stretches.items()
    ]
    lengths = []
    for first, second, budget in (*pairs, (low.homes_bytes, high.homes_bytes, budgets.host)):
        slope = (second - first) / (far - near)
        if slope > 0:
            lengths.append(near + (budget - first) / slope)
        elif first > budget:
            return 0
    return max(0, int(min(lengths, default=_NO_LIMIT)))


def _two_lengths(policy: Policy) -> tuple[int, int]:
    """Tokens of the two sequences that a line goes through: bytes are linear once a chunk sees a whole block of keys."""
    chunk = policy.chunk_tokens or KEY_BLOCK
    return KEY_BLOCK + chunk, KEY_BLOCK + 3 * chunk


def _may_stream_fewer(way: Strategy, estimate: Rehearsal, budgets: Budgets) -> bool:
    """Whether only the host's budget is exceeded, by weights that may stay on the device instead."""
    streams = way.footprint.policy.resident_layers is not None and way.footprint.policy.stream_from == "host"
    return (
        streams
        and estimate.peak_bytes <= budgets.device
        and _streamed_bytes(estimate) >= estimate.homes_bytes - budgets.host
    )


def _streamed_bytes(rehearsal: Rehearsal) -> int:
    return rehearsal.host_parts.get("host_weights", 0) + rehearsal.host_parts.get("host_quant_constants", 0)


def _estimate(way: Strategy, rehearse: Callable[[Strategy, MicroBatch], Rehearsal], batch: MicroBatch) -> Rehearsal:
    """Continue a line through two rehearsals for a sequence of many chunks; else rehearse it."""
    near, far = _two_lengths(way.footprint.policy)
    if not way.footprint.policy.chunk_tokens or batch.num_examples > 1 or batch.length <= far:
        return rehearse(way, batch)
    low, high = (rehearse(way, replace(batch, length=length)) for length in (near, far))
    share = (batch.length - near) / (far - near)

    def line(a: int, b: int) -> int:
        return a + round(share * (b - a))

    stretches = {
        name: {
            part: line(parts.get(part, 0), high.stretches[name].get(part, 0)) for part in parts | high.stretches[name]
        }
        for name, parts in low.stretches.items()
    }
    host = {
        part: line(low.host_parts.get(part, 0), high.host_parts.get(part, 0))
        for part in low.host_parts | high.host_parts
    }
    return replace(low, stretches=stretches, host_parts=host)


def _with_residents(
    way: Strategy, estimate: Rehearsal, rehearse: Callable[[Strategy, MicroBatch], Rehearsal], batch: MicroBatch,
    budgets: Budgets, num_layers: int,
) -> Strategy:  # fmt: skip
    """Keep as many layers resident as fit the device; two of the rest are in its buffers."""
    short = replace(batch, length=min(batch.length, 256))
    from_host = (_with_policy(way, stream_from="host", resident_layers=resident) for resident in (0, 1))
    none, one = (_streamed_bytes(rehearse(some, short)) for some in from_host)
    room = max(0, budgets.device - estimate.peak_bytes) // max(1, none - one)
    return _with_policy(way, resident_layers=min(num_layers - 1, room))


def _with_policy(way: Strategy, **changes: object) -> Strategy:
    policy = replace(way.footprint.policy, **changes)  # type: ignore[arg-type]
    return replace(way, footprint=replace(way.footprint, policy=policy))
