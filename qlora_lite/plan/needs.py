"""Requirements of the data: lengths, labels, shared prefixes, and lengths of held-out examples."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from qlora_lite.base.generation_settings import base_stops
from qlora_lite.base.skeleton import model_class
from qlora_lite.base.source import context_window, has_learned_positions, load_config
from qlora_lite.data.batches import sampler_of
from qlora_lite.data.examples import Examples, Reading, load_examples
from qlora_lite.data.inspect import propose_max_seq_length
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.data.template import Vocabulary
from qlora_lite.data.trees import Sharing, sharing
from qlora_lite.errors import DataError
from qlora_lite.evaluation.generate import BATCH_TOKENS
from qlora_lite.evaluation.held_out import held_out_rows, longest_scored
from qlora_lite.files.cache import TOKENIZED, default_cache
from qlora_lite.model.attention import why_not_shared
from qlora_lite.model.load import load_tokenizer
from qlora_lite.recipe import Reason, Recipe

SAMPLED_STEPS = 64  # steps whose examples are sampled for the savings of sharing
SIZED_STEPS = 4096  # later steps, of which only the sizes count
_SHARING = "data.share_prefixes"
LEAST_FACTOR = 1.05  # below this reduction of tokens, examples are packed without sharing


@dataclass(frozen=True)
class Needs:
    """Requirements of the data on a plan."""

    length: int  # tokens of the longest example
    reason: str
    label_share: float  # of all tokens
    is_free: bool = False  # the length may be shortened
    num_scored: int = 0  # held-out examples
    longest_scored: int = 0  # tokens of the longest of them; 0 if unknown
    scored_label_share: float = 0.0  # of all their tokens
    score_limit: int | None = None  # eval.max_seq_length; None: same as data.max_seq_length
    score_reason: str = "same as data.max_seq_length"
    score_is_free: bool = False  # longer examples than in training may be left out if they do not fit
    max_new_tokens: int = 32
    lengths: np.ndarray | None = None  # tokens of every example, uncut; None if unknown
    sharing: Sharing | None = None  # None: every example is computed separately

    def repeated(self, micro_batch_tokens: int) -> float:
        """Return the factor of repeated tokens when micro-batches of `micro_batch_tokens` cut prefix trees."""
        return 1.0 if self.sharing is None else self.sharing.repeated(micro_batch_tokens)


def reading_of(recipe: Recipe, source: Path) -> Reading:
    """How the recipe's training rows are read for the base in `source`. Raises ModelError."""
    data = recipe.data
    vocabulary = Vocabulary.of(load_config(source), data.special_tokens, base_stops(source))
    return Reading(data.format, data.num_train, data.no_answer_text, vocabulary)


def needs_of(recipe: Recipe, source: Path, cache: Path, *, limit: int | None) -> Needs:
    """Return the needs of the training data. With a given length it is read only if it exists and may share. Raises DataError."""
    asked, config = recipe.data.max_seq_length, load_config(source)
    reason = "asked for"
    if asked != "auto" and limit is not None and asked > limit:
        if has_learned_positions(config):
            raise DataError(
                f"data.max_seq_length: {asked} is more than the model's {limit} positions. Use at most {limit}, or auto"
            )
        reason += f"; the model was trained on at most {limit} positions, so later ones are new to it"
    needs = Needs(0, reason, 1.0, num_scored=num_scored(recipe), max_new_tokens=recipe.eval.max_new_tokens)
    length = 0 if asked == "auto" else asked
    may_share = (
        recipe.data.share_prefixes is not False and why_not_shared(model_class(config), config, length=length) is None
    )
    if asked != "auto" and not (may_share and _has_data(recipe)):
        return replace(needs, length=asked)
    examples = load_examples(
        recipe.data.train_files,
        load_tokenizer(source, special_tokens=recipe.data.special_tokens),
        reading_of(recipe, source),
        max_seq_length=None if asked == "auto" else asked,
        cache_dir=cache / TOKENIZED,
    )
    shared = _sharing_of(recipe, examples) if may_share else None
    if asked != "auto":
        return replace(needs, length=asked, sharing=shared)
    length, reason = propose_max_seq_length(examples.lengths, limit=limit, is_text=examples.is_text)
    label_share = float(examples.num_label_tokens.sum() / examples.lengths.sum())
    return replace(
        needs,
        length=length,
        reason=reason,
        label_share=label_share,
        is_free=True,
        lengths=examples.lengths,
        sharing=shared,
    )


def with_scored(
    recipe: Recipe, needs: Needs, source: Path, cache: Path, *, window: int | None, is_looked_at: bool
) -> Needs:
    """Return `needs` with the limit and the lengths of held-out examples; scoring accepts longer ones than training. Raises DataError."""
    data = recipe.data
    limit, reason = longest_scored(recipe.eval.max_seq_length, window=window, trained_length=needs.length)
    is_free = recipe.eval.max_seq_length == "auto"
    known = None if is_free and window is None else limit
    needs = replace(needs, score_limit=known, score_reason=reason, score_is_free=is_free)
    if not is_looked_at or known is None or data.eval is None or not Path(data.eval).exists():
        return needs
    rows = held_out_rows(
        data.eval,
        load_tokenizer(source, special_tokens=data.special_tokens),
        replace(reading_of(recipe, source), num_rows=recipe.eval.num_examples),
        max_seq_length=limit,
        text_length=needs.length,
        window=window,
        cache_dir=cache / TOKENIZED,
    )
    longest, share = int(rows.lengths.max()), float(rows.num_label_tokens.sum() / rows.lengths.sum())
    return replace(needs, longest_scored=longest, scored_label_share=share)


def _has_data(recipe: Recipe) -> bool:
    """Whether the training files exist; those of a finished run may be gone."""
    return all(Path(path).exists() for path, _ in recipe.data.train_files)


def _sharing_of(recipe: Recipe, examples: Examples) -> Sharing:
    """Return the sharing of training's first steps. Later steps, in another order, may be fuller, so their sizes count too."""
    train = recipe.train
    steps_per_epoch = math.ceil(len(examples.lengths) / train.examples_per_step)
    num_steps = train.max_steps or math.ceil((train.epochs or 1.0) * steps_per_epoch)
    sampler = sampler_of(
        examples,
        examples_per_step=train.examples_per_step,
        epochs=1.0,
        max_steps=max(num_steps, steps_per_epoch),
        seed=train.seed,
        share_prefixes=True,
    )
    num_sampled = min(steps_per_epoch, SAMPLED_STEPS)
    later = range(num_sampled, max(num_sampled, min(num_steps, num_sampled + SIZED_STEPS)))
    return sharing(examples, map(sampler.rows_of_step, range(num_sampled)), others=map(sampler.rows_of_step, later))


def what_is_shared(recipe: Recipe, source: Path) -> tuple[Sharing | None, Reason]:
    """-> (savings of packing the training examples as prefix trees, None if off; reason). Raises DataError."""
    config = load_config(source)
    needs = needs_of(recipe, source, default_cache(), limit=context_window(config))
    needs, reason = choose_sharing(recipe, needs, config)
    return needs.sharing, reason


def choose_sharing(recipe: Recipe, needs: Needs, config: PreTrainedConfig) -> tuple[Needs, Reason]:
    """-> (needs, with sharing=None if sharing is off; reason)."""
    asked, shared, off = recipe.data.share_prefixes, needs.sharing, replace(needs, sharing=None)
    if asked is False:
        return off, Reason(_SHARING, "off", "asked for")
    why_not = why_not_shared(model_class(config), config, length=needs.length)
    if why_not is not None:
        return off, Reason(_SHARING, "off", f"{why_not}; each example is computed separately")
    if shared is None:
        return needs, Reason(_SHARING, "off", "the training data are missing")
    saved = (
        f"{shared.num_alone:,} tokens of the first steps become {shared.num_packed:,}, {shared.factor:.2f} times fewer"
    )
    if asked == "auto" and shared.factor < LEAST_FACTOR:
        return off, Reason(_SHARING, "off", f"examples share too few prefix tokens; {saved}")
    return needs, Reason(_SHARING, "on", f"each prefix shared by examples of a step is computed once; {saved}")


def num_scored(recipe: Recipe) -> int:
    """Return the maximum number of held-out examples; for a whole file, enough to fill any batch."""
    return 0 if recipe.data.eval is None else recipe.eval.num_examples or BATCH_TOKENS


def choose_format(recipe: Recipe) -> tuple[str, str]:
    """-> (format of the training data, reason). Raises DataError."""
    data = recipe.data
    if not _has_data(recipe):
        return data.format, "the training data are missing"
    chosen, reason = find_format(data.train_files, format=data.format)
    if data.eval is None or not Path(data.eval).exists():
        return chosen, reason
    held_out = format_of_held_out(data.eval, format=chosen)
    return chosen, reason if held_out == chosen else f"{reason}; data.eval is {held_out}"
