"""Make it fit: a budget and what a recipe leaves free -> `Fit`, with a reason for each choice, or what would help where nothing fits.

The strategy first, at the length that the data ask for; where not even the leanest fits and the length is free too, the longest that
fits with the leanest, or the shortest there is. So a smaller budget never gives a plan that needs more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from qlora_lite.data.trees import Sharing
from qlora_lite.plan.compare import Rehearsals
from qlora_lite.plan.fits import STEP, Growth, Labels, Room, longest_length
from qlora_lite.plan.needs import Needs
from qlora_lite.plan.rehearsal import NF4, MicroBatch, Rehearsal, Settings
from qlora_lite.plan.scoring import Scoring
from qlora_lite.plan.strategy import (
    CHECKPOINTING,
    EVAL_BATCH_TOKENS,
    OPTIMIZERS,
    Choice,
    Free,
    Strategy,
    choose,
    strategies,
)
from qlora_lite.training.footprint import Footprint
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class Concession:
    """A setting that the planner may not change by itself, and what it would bring on top of all that it may."""

    setting: str  # as --set takes it
    peak_bytes: int
    saves_bytes: int


@dataclass(frozen=True)
class Fit:
    """All that was chosen. `reasons` by recipe key."""

    settings: Settings
    footprint: Footprint
    batch: MicroBatch
    scoring: Scoring | None  # None where nothing is scored
    length: int
    score_limit: int  # tokens of the longest row that is scored
    slowdown: float  # against the fastest way there is
    reasons: dict[str, str]

    @property
    def slowdown_in_words(self) -> str:
        """The end of a sentence about the budget; empty where nothing is slower."""
        if self.slowdown < 1.005:
            return ""
        return f"; to stay within it a step takes about {self.slowdown:.2f} times as long as it could"


def fit(rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, *, budget_bytes: int) -> Fit:
    """`settings` with what `free` leaves open chosen; the leanest where nothing fits. Rehearses only where there is a choice."""
    needs, choice = _choose(rehearsals, settings, free, needs, budget_bytes)
    way = choice.strategy
    scoring, score_limit, reasons = _choose_scoring(
        rehearsals, _with(settings, way), free, needs, _batch(way, needs), budget_bytes if choice.fits else 0
    )
    return Fit(
        settings=_with(settings, way),
        footprint=way.footprint,
        batch=_batch(way, needs),
        scoring=scoring,
        length=needs.length,
        score_limit=score_limit,
        slowdown=way.slowdown,
        reasons={
            "data.max_seq_length": f"{needs.length}: {needs.reason}",
            **_reasons(choice, free, budget_bytes),
            **reasons,
        },
    )


def largest_batch(micro_batch_tokens: int, length: int, label_share: float) -> MicroBatch:
    """A micro-batch as full as it may be: of equal examples, each as long as they come or a little shorter."""
    num_examples = -(-micro_batch_tokens // length)
    return MicroBatch(micro_batch_tokens // num_examples, num_examples, label_share)


def validation_batch(batch: MicroBatch, longest: int, label_share: float) -> MicroBatch:
    """The fullest of the validation loss: training's own, or one with the longest scored row where that is longer than training's."""
    if longest <= batch.length:
        return batch
    return largest_batch(max(batch.length * batch.num_examples, longest), longest, max(batch.label_share, label_share))


def largest_tree(micro_batch_tokens: int, sharing: Sharing, *, length: int | None = None) -> MicroBatch:
    """A micro-batch as full as it may be, or as the fullest step, or the longest row: average branches, or a little longer ones, on one
    trunk. It holds that many tokens exactly, so what branches of one length leave over goes to the trunk. `length`: what
    rows will be cut to, where that is less than they have.
    """
    tokens = min(micro_batch_tokens, sharing.most_tokens or micro_batch_tokens)
    longest = sharing.longest_row if length is None else min(length, sharing.longest_row)
    tokens = max(tokens, longest, 2)  # a token to predict from, and a label
    branch = min(sharing.branch, tokens)
    num_examples = max(1, (tokens - min(sharing.trunk, tokens - branch)) // branch)
    if 0 < sharing.most_rows < num_examples:  # the rest are further trunks
        num_examples = sharing.most_rows
    else:
        branch = max(branch, (tokens - min(sharing.trunk, tokens - branch)) // num_examples)
    if num_examples * branch == tokens == num_examples:  # each example needs a token before its label
        num_examples -= 1
    trunk = tokens - num_examples * branch
    return MicroBatch(trunk + branch, num_examples, sharing.num_labels / (trunk + branch), trunk=trunk)


def leanest_settings(settings: Settings, free: Free) -> Settings:
    """For the longest sequences: all that is free as lean as it comes, but for the head's chunk."""
    return replace(
        settings,
        checkpoint_every=CHECKPOINTING[-1] if free.checkpoint_every is None else settings.checkpoint_every,
        optimizer=OPTIMIZERS[-1] if free.optimizer is None else settings.optimizer,
    )


def concessions(
    rehearsals: Rehearsals, settings: Settings, batch: MicroBatch, scoring: Scoring | None
) -> tuple[Concession, ...]:
    """What further settings would save, those that save most first."""
    now = rehearsals.of(settings, batch, scoring).peak_bytes
    evaluation = 0 if scoring is None else sum(rehearsals.evaluation(settings, scoring).values())

    def peak_bytes(other: Settings, smaller: MicroBatch) -> int:
        """Evaluating needs no more than it did, so it is rehearsed only where it may be what needs most."""
        peak = rehearsals.of(other, smaller).peak_bytes
        return peak if peak >= evaluation else rehearsals.of(other, smaller, _shortened(scoring, smaller)).peak_bytes

    peaks = {setting: peak_bytes(other, smaller) for setting, other, smaller in _further(settings, batch)}
    for longest in () if scoring is None else _shorter_rows(scoring, batch):
        assert scoring is not None
        less = _shortened(replace(scoring, longest=longest, prompts=(longest,) * len(scoring.prompts)), batch)
        peaks[f"eval.max_seq_length={longest}"] = rehearsals.of(settings, batch, less).peak_bytes
    found = [Concession(setting, peak, now - peak) for setting, peak in peaks.items() if peak < now]
    return tuple(sorted(found, key=lambda concession: concession.peak_bytes))


def shortage(found: Rehearsal, further: tuple[Concession, ...], *, budget_bytes: int) -> str:
    """Why it does not fit and what to do, for people."""
    largest = max(found.parts, key=lambda part: found.parts[part])
    what = (
        f"does not fit: needs {format_bytes(found.peak_bytes)} of {format_bytes(budget_bytes)}, which is the smallest budget for these "
        f"settings. Largest part: {largest.replace('_', ' ')} {format_bytes(found.parts[largest])}."
    )
    helps = [concession for concession in further if concession.peak_bytes <= budget_bytes]
    if helps:
        ways = [
            f"--set {concession.setting} (needs {format_bytes(concession.peak_bytes)})" for concession in helps[::-1]
        ]
        return f"{what} Try {', or '.join(ways)}"
    saved = ", ".join(f"{each.setting} saves {format_bytes(each.saves_bytes)}" for each in further)
    return f"{what} No one setting is enough{f': {saved}' if saved else ''}. Use a smaller model"


def _choose(
    rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, budget_bytes: int
) -> tuple[Needs, Choice]:
    def choice_for(needs: Needs) -> Choice:
        ways = strategies(
            free,
            card=settings.card,
            method=settings.method,
            length=needs.length,
            repeated=needs.repeated,
        )
        if len(ways) == 1 and not needs.is_free:
            return Choice(ways[0], fits=True, tried={})  # nothing to choose: whether it fits is asked when it matters
        return choose(ways, lambda way: rehearsals.of(_with(settings, way), _batch(way, needs)).peak_bytes,
                      budget_bytes=budget_bytes)  # fmt: skip

    choice = choice_for(needs)
    if choice.fits or not needs.is_free:
        return needs, choice
    shorter = _longest(rehearsals, _with(settings, choice.strategy), needs, budget_bytes)
    reason = _loss_in_words(needs, shorter, budget_bytes)
    needs = replace(needs, length=shorter or min(STEP, needs.length), reason=reason)
    return needs, choice_for(needs)


def _longest(rehearsals: Rehearsals, settings: Settings, needs: Needs, budget_bytes: int) -> int | None:
    """Of one example, rehearsed itself: what its neighbours say may be off by a little."""
    labels = Labels(partial(rehearsals.shallow, settings), chunk=settings.head_chunk)
    growth = Growth(partial(rehearsals.of, settings), rehearsals.config, labels, label_share=needs.label_share)
    length = longest_length(growth, Room(budget_bytes, needs.length, needs.label_share))
    while length and rehearsals.of(settings, MicroBatch(length, 1, needs.label_share)).peak_bytes > budget_bytes:
        length -= STEP
    return length or None


def _choose_scoring(
    rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, batch: MicroBatch, budget_bytes: int
) -> tuple[Scoring | None, int, dict[str, str]]:
    """-> (what is scored, None for nothing; the longest row that is; reasons by recipe key).

    Rows that are longer than training's are left out where they do not fit and the recipe leaves their length open.
    """
    limit, why = needs.score_limit or needs.length, needs.score_reason
    if not needs.num_scored:
        tokens = free.eval_batch_tokens or EVAL_BATCH_TOKENS[0]
        reason = f"{tokens}: nothing is scored"
        return None, limit, {"eval.max_seq_length": f"{limit}: {why}", "memory.eval_batch_tokens": reason}

    def fits(scoring: Scoring) -> bool:
        return bool(budget_bytes) and sum(rehearsals.evaluation(settings, scoring).values()) <= budget_bytes

    found = _batch_of_answers(needs, free, batch, needs.longest_scored, fits)
    if needs.score_is_free and needs.length < needs.longest_scored and not fits(found):
        found, limit = _batch_of_answers(needs, free, batch, 0, fits), needs.length
        why = f"as long as training's rows; longer ones, up to {needs.longest_scored}, do not fit {format_bytes(budget_bytes)}"
    asked = "asked for" if free.eval_batch_tokens is not None else ""
    reasons = {
        "eval.max_seq_length": f"{limit}: {why}",
        "memory.eval_batch_tokens": f"{found.batch_tokens}"
        + (f": {asked}" if asked else " prompt tokens are answered at once"),
    }
    return found, limit, reasons


def _batch_of_answers(
    needs: Needs, free: Free, batch: MicroBatch, longest: int, fits: Callable[[Scoring], bool]
) -> Scoring:
    """The largest batch of answers that fits, of prompts as long as they come; the smallest where nothing does."""
    length = max(needs.length, longest)
    found = Scoring(
        validation_batch(batch, longest, needs.scored_label_share),
        (length,) * min(needs.num_scored, EVAL_BATCH_TOKENS[0]),
        needs.max_new_tokens,
        free.eval_batch_tokens or EVAL_BATCH_TOKENS[0],
        share=needs.sharing is not None,
        longest=longest,
    )
    for tokens in () if free.eval_batch_tokens is not None else EVAL_BATCH_TOKENS:
        found = replace(found, batch_tokens=tokens)
        if tokens <= length or fits(found):
            break  # a batch holds one prompt at least
    return found


def _with(settings: Settings, way: Strategy) -> Settings:
    return replace(
        settings,
        checkpoint_every=way.footprint.checkpoint_every,
        head_chunk=way.footprint.head_chunk,
        optimizer=way.optimizer,
    )


def _batch(way: Strategy, needs: Needs) -> MicroBatch:
    tokens = way.footprint.micro_batch_tokens
    if needs.sharing is not None:
        return largest_tree(tokens, needs.sharing, length=needs.length)
    return largest_batch(tokens, needs.length, needs.label_share)


def _loss_in_words(needs: Needs, shorter: int | None, budget_bytes: int) -> str:
    if shorter is None:
        return f"the shortest that is tried, and not even that fits {format_bytes(budget_bytes)}; the data would take {needs.length}"
    reason = f"the longest that fits {format_bytes(budget_bytes)}; the data would take {needs.length}"
    if needs.lengths is None:
        return reason
    num_longer = int((needs.lengths > shorter).sum())
    return f"{reason}, and {num_longer} of {len(needs.lengths)} rows are longer: cut where their format allows it, else left out"


def _reasons(choice: Choice, free: Free, budget_bytes: int) -> dict[str, str]:
    way = choice.strategy
    return {
        "memory.gradient_checkpointing": _checkpointing_reason(choice, free, budget_bytes),
        "train.micro_batch_tokens": f"{way.footprint.micro_batch_tokens}: "
        + ("asked for" if free.micro_batch_tokens is not None else _tokens_reason(choice, budget_bytes))
        + "; does not change the result",
        "memory.head_chunk": f"{way.footprint.head_chunk} label tokens are projected at once"
        + (", as asked for" if free.head_chunk is not None else ""),
        "train.optimizer": f"{way.optimizer}: "
        + ("asked for" if free.optimizer is not None else f"the most exact that fits {format_bytes(budget_bytes)}"),
    }


def _checkpointing_reason(choice: Choice, free: Free, budget_bytes: int) -> str:
    every = choice.strategy.footprint.checkpoint_every
    layers = {0: "off", 1: "on"}.get(every, f"in one layer of {every}")
    if free.checkpoint_every is not None:
        return f"{layers}: asked for"
    if every == 0:
        return f"{layers}: all activations fit {format_bytes(budget_bytes)}, so nothing is computed twice"
    less = {way: peak for way, peak in choice.tried.items() if way.footprint.checkpoint_every == CHECKPOINTING[0]}
    fitting = [way.footprint.micro_batch_tokens for way, peak in less.items() if peak <= budget_bytes]
    if not less:
        without = f"keeps one hidden state a layer; the budget is {format_bytes(budget_bytes)}"
    elif fitting:
        without = f"without it {max(fitting)} tokens would fit {format_bytes(budget_bytes)} at once, so few that a step would take longer"
    else:
        without = (
            f"without it at least {format_bytes(min(less.values()))} of {format_bytes(budget_bytes)} would be needed"
        )
    return f"{layers}: {without}"


def _tokens_reason(choice: Choice, budget_bytes: int) -> str:
    tokens = choice.strategy.footprint.micro_batch_tokens
    if not any(way.footprint.micro_batch_tokens > tokens for way in choice.tried):
        return "enough to hide dequantizing the weights" if choice.fits else "as few as the longest example has"
    return f"the most that fits {format_bytes(budget_bytes)} with the other settings"


def _shortened(scoring: Scoring | None, batch: MicroBatch) -> Scoring | None:
    """Of rows that are no longer than the batch's, but for those that are known to be: data.max_seq_length does not cut them."""
    if scoring is None:
        return None
    prompts = tuple(max(min(prompt, batch.length), scoring.longest) for prompt in scoring.prompts)
    validation = validation_batch(batch, scoring.longest, scoring.validation.label_share)
    return replace(scoring, validation=validation, prompts=prompts)


def _shorter_rows(scoring: Scoring, batch: MicroBatch) -> Iterator[int]:
    """Values of eval.max_seq_length that leave rows out."""
    if scoring.longest > batch.length:
        yield batch.length
        if scoring.longest // 2 > batch.length:
            yield scoring.longest // 2


def _further(settings: Settings, batch: MicroBatch) -> Iterator[tuple[str, Settings, MicroBatch]]:
    """-> (what to set, settings, batch) of everything else that might help."""
    one = replace(batch, num_examples=1)
    if settings.method != "qlora":
        yield "method=qlora", replace(settings, method="qlora", quantization=NF4), batch
    if settings.method == "qlora" and settings.quantization.kind == "int8":
        yield "model.quantization=nf4", replace(settings, quantization=NF4), batch
    if settings.checkpoint_every != 1:
        yield "memory.gradient_checkpointing=true", replace(settings, checkpoint_every=1), batch
    if batch.num_examples > 1:
        yield f"train.micro_batch_tokens={batch.length}", settings, one
    for part in (2, 4):
        if batch.length // part >= 64:
            shorter = one.shortened(batch.length // part)
            yield f"data.max_seq_length={shorter.length}", settings, shorter
    if settings.optimizer != OPTIMIZERS[-1]:
        yield f"train.optimizer={OPTIMIZERS[-1]}", replace(settings, optimizer=OPTIMIZERS[-1]), batch
    if settings.method != "full" and settings.r > 8:
        yield "lora.r=8", replace(settings, r=8), batch
