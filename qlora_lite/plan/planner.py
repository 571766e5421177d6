"""Make a plan fit: a budget and a recipe's free settings -> `Fit`, with a reason for each choice, or concessions if nothing fits.

The strategy is chosen first, at the length of the data. If the leanest does not fit and the length is free, the longest length that fits
with the leanest strategy is chosen, or the shortest length. So a smaller budget never gives a plan that needs more memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from qlora_lite.data.trees import Sharing
from qlora_lite.model.policy import PLAIN
from qlora_lite.plan.compare import Rehearsals
from qlora_lite.plan.fits import STEP, Growth, Labels, Room, longest_length
from qlora_lite.plan.homes import Budgets, Shape, added_times, choose_homes, homes, longest_of_all
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
from qlora_lite.recipe import Reason
from qlora_lite.training.footprint import Footprint
from qlora_lite.units import format_bytes

SHORTEST_SCORED = 512  # tokens: a smaller automatic eval.max_seq_length would leave out nearly every row


@dataclass(frozen=True)
class Concession:
    """A setting that only the user may change, and the memory it saves on top of the planner's choices."""

    setting: str  # in the form of --set
    peak_bytes: int
    saves_bytes: int


@dataclass(frozen=True)
class Fit:
    """The planner's choices, with their reasons."""

    settings: Settings
    footprint: Footprint
    batch: MicroBatch
    scoring: Scoring | None  # None if nothing is scored
    length: int
    score_limit: int  # tokens of the longest scored example
    slowdown: float  # relative to the fastest strategy
    reasons: tuple[Reason, ...]

    @property
    def slowdown_in_words(self) -> str:
        """The end of a sentence about the budget; empty if the step is not slower."""
        if self.slowdown < 1.005:
            return ""
        return f"; with this budget a step takes about {self.slowdown:.2f} times as long as with the fastest settings"


def fit(rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, budgets: Budgets) -> Fit:
    """Complete `settings` with choices for everything free, the leanest if nothing fits. Rehearses only if there is a choice."""
    needs, choice = _choose(rehearsals, settings, free, needs, budgets)
    way, budget_bytes = choice.strategy, budgets.device
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
        reasons=(
            Reason("data.max_seq_length", str(needs.length), needs.reason),
            *_reasons(choice, free, budget_bytes),
            *_homes_reasons(choice, free, budgets, partial(_shape_of, rehearsals, settings), settings),
            *reasons,
        ),
    )


def largest_batch(micro_batch_tokens: int, length: int, label_share: float) -> MicroBatch:
    """Return the fullest micro-batch of equal examples, each of length `length` or slightly shorter."""
    num_examples = -(-micro_batch_tokens // length)
    return MicroBatch(micro_batch_tokens // num_examples, num_examples, label_share)


def validation_batch(batch: MicroBatch, longest: int, label_share: float) -> MicroBatch:
    """Return the fullest batch of the validation loss: training's, or one with the longest scored example if that is longer."""
    if longest <= batch.length:
        return batch
    return largest_batch(max(batch.length * batch.num_examples, longest), longest, max(batch.label_share, label_share))


def largest_tree(micro_batch_tokens: int, sharing: Sharing, *, length: int | None = None) -> MicroBatch:
    """Return the largest micro-batch of a tree: branches of average length, or slightly longer, on one trunk.

    Its tokens are those of a full micro-batch, of the fullest step, or of the longest example, exactly: the trunk takes the remainder
    of the branches. `length` is the cut of examples, if they are longer.
    """
    tokens = min(micro_batch_tokens, sharing.most_tokens or micro_batch_tokens)
    longest = sharing.longest_row if length is None else min(length, sharing.longest_row)
    tokens = max(tokens, longest, 2)  # a token to predict from, and a label
    branch = min(sharing.branch, tokens)
    num_examples = max(1, (tokens - min(sharing.trunk, tokens - branch)) // branch)
    if 0 < sharing.most_rows < num_examples:  # the remaining tokens are further trunks
        num_examples = sharing.most_rows
    else:
        branch = max(branch, (tokens - min(sharing.trunk, tokens - branch)) // num_examples)
    if num_examples * branch == tokens == num_examples:  # each example needs a token before its label
        num_examples -= 1
    trunk = tokens - num_examples * branch
    return MicroBatch(trunk + branch, num_examples, sharing.num_labels / (trunk + branch), trunk=trunk)


def leanest_settings(settings: Settings, free: Free) -> Settings:
    """Return the leanest ordinary step, except for the head's chunk: for the longest sequences without other homes (homes.py)."""
    return replace(
        settings,
        checkpoint_every=CHECKPOINTING[-1] if free.checkpoint_every is None else settings.checkpoint_every,
        optimizer=OPTIMIZERS[-1] if free.optimizer is None else settings.optimizer,
        policy=PLAIN,
    )


def concessions(
    rehearsals: Rehearsals, settings: Settings, batch: MicroBatch, scoring: Scoring | None
) -> tuple[Concession, ...]:
    """Return the settings that would save memory, largest saving first."""
    now = rehearsals.of(settings, batch, scoring).peak_bytes
    evaluation = 0 if scoring is None else sum(rehearsals.evaluation(settings, scoring).values())

    def peak_bytes(leaner: Settings, smaller: MicroBatch) -> int:
        """Rehearse evaluation only if it may have the highest peak: it never needs more than with `settings`."""
        peak = rehearsals.of(leaner, smaller).peak_bytes
        return peak if peak >= evaluation else rehearsals.of(leaner, smaller, _shortened(scoring, smaller)).peak_bytes

    peaks = {setting: peak_bytes(leaner, smaller) for setting, leaner, smaller in _further(settings, batch)}
    for longest in () if scoring is None else _shorter_rows(scoring, batch):
        assert scoring is not None
        shorter = _shortened(replace(scoring, longest=longest, prompts=(longest,) * len(scoring.prompts)), batch)
        peaks[f"eval.max_seq_length={longest}"] = rehearsals.of(settings, batch, shorter).peak_bytes
    savings = [Concession(setting, peak, now - peak) for setting, peak in peaks.items() if peak < now]
    return tuple(sorted(savings, key=lambda concession: concession.peak_bytes))


def shortage(rehearsal: Rehearsal, further: tuple[Concession, ...], budgets: Budgets) -> str:
    """Return a message for users: the shortage, the largest part of the tighter memory, and settings to try."""
    needed, budget_bytes, parts, where = rehearsal.peak_bytes, budgets.device, rehearsal.parts, ""
    if budgets.host and rehearsal.homes_bytes / budgets.host > needed / max(1, budget_bytes):
        needed, budget_bytes, parts, where = (
            rehearsal.homes_bytes,
            budgets.host,
            rehearsal.host_parts,
            " of host memory",
        )
    largest = max(parts, key=lambda part: parts[part])
    problem = (
        f"does not fit: needs {format_bytes(needed)} (the smallest budget for these settings) of "
        f"{format_bytes(budget_bytes)}{where}. Largest part: {largest.replace('_', ' ')} {format_bytes(parts[largest])}."
    )
    helps = [concession for concession in further if concession.peak_bytes <= budgets.device] if not where else []
    if helps:
        proposals = [
            f"--set {concession.setting} (needs {format_bytes(concession.peak_bytes)})" for concession in helps[::-1]
        ]
        return f"{problem} Try {', or '.join(proposals)}"
    saved = ", ".join(f"{concession.setting} saves {format_bytes(concession.saves_bytes)}" for concession in further)
    return f"{problem} No single setting is enough{f': {saved}' if saved else ''}. Use a smaller model"


def _choose(
    rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, budgets: Budgets
) -> tuple[Needs, Choice]:
    """Choose an ordinary strategy if one fits, else one with parts of the model elsewhere, else a shorter length."""

    def rehearse(way: Strategy, batch: MicroBatch) -> Rehearsal:
        return rehearsals.of(_with(settings, way), batch)

    def choice_for(needs: Needs) -> Choice:
        ordinary = strategies(
            free,
            card=settings.card,
            method=settings.method,
            length=needs.length,
            repeated=needs.repeated,
        )
        choice = choose(ordinary, lambda way: rehearse(way, _batch(way, needs)).peak_bytes, budget_bytes=budgets.device)
        if choice.fits and not free.asks_for_homes:
            return choice
        ways = homes_of(rehearsals, settings, free, needs.length, has_host=bool(budgets.host))
        if not ways:
            return choice
        depth = rehearsals.config.num_hidden_layers
        is_free = "resident_layers" not in dict(free.policy)
        return choose_homes(ways, rehearse, _batch(ways[0], needs), budgets, num_layers=depth, resident_is_free=is_free)

    choice = choice_for(needs)
    if choice.fits or not needs.is_free:
        return needs, choice
    shorter = _longest(rehearsals, _with(settings, choice.strategy), free, needs, budgets)
    reason = _length_reason(needs, shorter, budgets.device)
    needs = replace(needs, length=shorter or min(STEP, needs.length), reason=reason)
    return needs, choice_for(needs)


def homes_of(
    rehearsals: Rehearsals, settings: Settings, free: Free, length: int, *, has_host: bool
) -> tuple[Strategy, ...]:
    """Return the strategies of homes.py for sequences of `length` tokens."""
    if settings.method == "full":
        return ()
    shape = _shape_of(rehearsals, settings)
    return homes(free, settings, config=rehearsals.config, shape=shape, length=length, has_host=has_host)


def _shape_of(rehearsals: Rehearsals, settings: Settings) -> Shape:
    whole = rehearsals.of(replace(settings, policy=PLAIN, checkpoint_every=1), MicroBatch(STEP, 1, 0.1))
    stored = whole.parts["weights"] + whole.parts["quant_constants"]
    return Shape.of(rehearsals.config, whole.num_weights, stored / whole.num_weights)


def _longest(rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, budgets: Budgets) -> int | None:
    """Return the longest length of one example, confirmed by its own rehearsal: interpolation may be slightly off."""
    if not settings.policy.is_plain:
        ways = homes_of(rehearsals, settings, free, needs.length, has_host=bool(budgets.host))

        def rehearse(way: Strategy, batch: MicroBatch) -> Rehearsal:
            return rehearsals.of(_with(settings, way), batch)

        best = longest_of_all(ways, rehearse, needs.label_share, budgets, limit=needs.length)
        return best and best[1]
    labels = Labels(partial(rehearsals.shallow, settings), chunk=settings.head_chunk)
    growth = Growth(partial(rehearsals.of, settings), rehearsals.config, labels, label_share=needs.label_share)
    length = longest_length(growth, Room(budgets.device, needs.length, needs.label_share))
    while length and rehearsals.of(settings, MicroBatch(length, 1, needs.label_share)).peak_bytes > budgets.device:
        length -= STEP
    return length or None


def _choose_scoring(
    rehearsals: Rehearsals, settings: Settings, free: Free, needs: Needs, batch: MicroBatch, budget_bytes: int
) -> tuple[Scoring | None, int, tuple[Reason, ...]]:
    """-> (scoring, None if nothing is scored; tokens of the longest scored example; reasons).

    Examples longer than training's are left out if they do not fit and eval.max_seq_length is free.
    """
    limit, length_reason = needs.score_limit or needs.length, needs.score_reason
    if not needs.num_scored:
        of_length = Reason("eval.max_seq_length", str(limit), length_reason)
        tokens = str(free.eval_batch_tokens or EVAL_BATCH_TOKENS[0])
        return None, limit, (of_length, Reason("memory.eval_batch_tokens", tokens, "nothing is scored"))

    def fits(scoring: Scoring) -> bool:
        return bool(budget_bytes) and sum(rehearsals.evaluation(settings, scoring).values()) <= budget_bytes

    scoring = _batch_of_answers(needs, free, batch, needs.longest_scored, fits)
    if needs.score_is_free and needs.length < needs.longest_scored and not fits(scoring):
        scoring, limit = _batch_of_answers(needs, free, batch, 0, fits), needs.length
        length_reason = (
            f"same as data.max_seq_length; longer examples, up to {needs.longest_scored} tokens, do not fit "
            f"{format_bytes(budget_bytes)}"
        )
    is_long = not settings.policy.is_plain and needs.score_is_free and bool(budget_bytes)
    while (
        is_long and limit > SHORTEST_SCORED and not fits(scoring)
    ):  # keys and values of every layer stay while an answer is written
        limit = max(SHORTEST_SCORED, min(limit, needs.length) // 2)
        scoring = _batch_of_answers(replace(needs, length=limit), free, batch, 0, fits)
        length_reason = (
            f"prompts of more than {limit} tokens do not fit {format_bytes(budget_bytes)} while they are answered"
        )
    tokens, is_asked = str(scoring.batch_tokens), free.eval_batch_tokens is not None
    value, why = (tokens, "asked for") if is_asked else ("", f"{tokens} prompt tokens per batch of answers")
    of_length = Reason("eval.max_seq_length", str(limit), length_reason)
    return scoring, limit, (of_length, Reason("memory.eval_batch_tokens", value, why))


def _batch_of_answers(
    needs: Needs, free: Free, batch: MicroBatch, longest: int, fits: Callable[[Scoring], bool]
) -> Scoring:
    """Return the largest batch of answers that fits with the longest prompts, or the smallest if none fits."""
    length = max(needs.length, longest)
    scoring = Scoring(
        validation_batch(batch, longest, needs.scored_label_share),
        (length,) * min(needs.num_scored, EVAL_BATCH_TOKENS[0]),
        needs.max_new_tokens,
        free.eval_batch_tokens or EVAL_BATCH_TOKENS[0],
        share_prefixes=needs.sharing is not None,
        longest=longest,
    )
    for tokens in () if free.eval_batch_tokens is not None else EVAL_BATCH_TOKENS:
        scoring = replace(scoring, batch_tokens=tokens)
        if tokens <= length or fits(scoring):
            break  # a batch has at least one prompt
    return scoring


def _with(settings: Settings, way: Strategy) -> Settings:
    return replace(
        settings,
        checkpoint_every=way.footprint.checkpoint_every,
        head_chunk=way.footprint.head_chunk,
        policy=way.footprint.policy,
        optimizer=way.optimizer,
    )


def _batch(way: Strategy, needs: Needs) -> MicroBatch:
    tokens = way.footprint.micro_batch_tokens
    if needs.sharing is not None:
        return largest_tree(tokens, needs.sharing, length=needs.length)
    return largest_batch(tokens, needs.length, needs.label_share)


def _length_reason(needs: Needs, shorter: int | None, budget_bytes: int) -> str:
    if shorter is None:
        return f"the shortest length tried, which does not fit {format_bytes(budget_bytes)} either; the data need {needs.length}"
    reason = f"the longest that fits {format_bytes(budget_bytes)}; the data need {needs.length}"
    if needs.lengths is None:
        return reason
    num_longer = int((needs.lengths > shorter).sum())
    return f"{reason}; {num_longer} of {len(needs.lengths)} examples are longer: cut if their format allows it, else left out"


def _reasons(choice: Choice, free: Free, budget_bytes: int) -> tuple[Reason, ...]:
    footprint, optimizer = choice.strategy.footprint, choice.strategy.optimizer
    why_tokens = "asked for" if free.micro_batch_tokens is not None else _tokens_reason(choice, budget_bytes)
    chunk = f"{footprint.head_chunk} label tokens are projected at a time"
    most_precise = f"the most precise that fits {format_bytes(budget_bytes)}"
    return (
        _checkpointing_reason(choice, free, budget_bytes),
        Reason(
            "train.micro_batch_tokens",
            str(footprint.micro_batch_tokens),
            f"{why_tokens}; does not change the result",
        ),
        Reason("memory.head_chunk", "", chunk + (", as asked for" if free.head_chunk is not None else "")),
        Reason("train.optimizer", optimizer, "asked for" if free.optimizer is not None else most_precise),
    )


def _homes_reasons(
    choice: Choice, free: Free, budgets: Budgets, shape: Callable[[], Shape], settings: Settings
) -> tuple[Reason, ...]:
    """The reasons of a step with chunks or with parts of the model elsewhere, and the time that each adds; none for an ordinary step."""
    footprint = choice.strategy.footprint
    policy = footprint.policy
    if policy.is_plain:
        return ()
    added = added_times(policy, shape(), settings.card, footprint.micro_batch_tokens, method=settings.method)
    asked = dict(free.policy)
    host = f", and {format_bytes(budgets.host)} of host memory" if budgets.host else ""
    why = f"the fastest tried that fits {format_bytes(budgets.device)}{host}"
    if not choice.fits:
        why = f"the leanest tried; it does not fit {format_bytes(budgets.device)}{host}"
    return tuple(
        Reason(
            f"memory.{key}",
            str(getattr(policy, key)),
            f"{'asked for' if key in asked else why}; adds about {100 * share:.0f}% to the time of a step",
        )
        for key, share in added.items()
    )


def _checkpointing_reason(choice: Choice, free: Free, budget_bytes: int) -> Reason:
    every = choice.strategy.footprint.checkpoint_every
    if not choice.strategy.footprint.policy.is_plain:
        every_layer = "every layer is computed again in the backward pass"
        return Reason(
            "memory.gradient_checkpointing", "on", f"{every_layer}; the budget is {format_bytes(budget_bytes)}"
        )
    chosen = partial(
        Reason, "memory.gradient_checkpointing", {0: "off", 1: "on"}.get(every, f"in one layer of {every}")
    )
    if free.checkpoint_every is not None:
        return chosen("asked for")
    if every == 0:
        return chosen(f"all activations fit {format_bytes(budget_bytes)}, so none are recomputed")
    without = {way: peak for way, peak in choice.tried.items() if way.footprint.checkpoint_every == CHECKPOINTING[0]}
    fitting = [way.footprint.micro_batch_tokens for way, peak in without.items() if peak <= budget_bytes]
    if not without:
        why = f"keeps one hidden state per layer; the budget is {format_bytes(budget_bytes)}"
    elif fitting:
        why = f"without it, micro-batches of at most {max(fitting)} tokens fit {format_bytes(budget_bytes)}, which is slower"
    else:
        smallest = format_bytes(min(without.values()))
        why = f"without it, a step needs at least {smallest}; the budget is {format_bytes(budget_bytes)}"
    return chosen(why)


def _tokens_reason(choice: Choice, budget_bytes: int) -> str:
    tokens = choice.strategy.footprint.micro_batch_tokens
    if not choice.strategy.footprint.policy.is_plain:
        return "the tokens of the longest example"
    if not any(way.footprint.micro_batch_tokens > tokens for way in choice.tried):
        return "enough to hide the cost of dequantizing weights" if choice.fits else "the tokens of the longest example"
    return f"the most that fit {format_bytes(budget_bytes)} with the other settings"


def _shortened(scoring: Scoring | None, batch: MicroBatch) -> Scoring | None:
    """Return `scoring` with prompts cut to the batch's length, but not known longer ones: data.max_seq_length does not cut those."""
    if scoring is None:
        return None
    prompts = tuple(max(min(prompt, batch.length), scoring.longest) for prompt in scoring.prompts)
    validation = validation_batch(batch, scoring.longest, scoring.validation.label_share)
    return replace(scoring, validation=validation, prompts=prompts)


def _shorter_rows(scoring: Scoring, batch: MicroBatch) -> Iterator[int]:
    """Yield values of eval.max_seq_length that leave examples out."""
    if scoring.longest > batch.length:
        yield batch.length
        if scoring.longest // 2 > batch.length:
            yield scoring.longest // 2


def _further(settings: Settings, batch: MicroBatch) -> Iterator[tuple[str, Settings, MicroBatch]]:
    """Yield (KEY=VALUE, settings, batch) of every further setting that may help."""
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
