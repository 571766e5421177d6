"""The verb `check`: recipe, data, rendered rows with their trained tokens, lengths; everything except training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.base.source import context_window, find_base, load_config
from qlora_lite.data.examples import Examples, ReadCounts, load_examples
from qlora_lite.data.inspect import DataReport, inspect_rows
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.data.repeats import Repeats, find_repeats
from qlora_lite.data.trees import Sharing
from qlora_lite.errors import UserError
from qlora_lite.evaluation.held_out import LeftOut, account_of, held_out_rows, left_out_of, longest_scored
from qlora_lite.files.cache import TOKENIZED, default_cache
from qlora_lite.model.load import load_tokenizer
from qlora_lite.plan import reading_of, refuse_wrong_modules, what_is_shared
from qlora_lite.recipe import Reason, Recipe, load_recipe


@dataclass(frozen=True)
class HeldOut:
    """The rows of data.eval by outcome."""

    counts: ReadCounts
    left_out: LeftOut
    format: str

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self.counts.num_read,
            "num_dropped": self.counts.num_dropped,
            "num_bad": self.counts.num_bad,
            **self.left_out.to_json_dict(),
            "format": self.format,
            "notes": list(self.counts.notes),
        }


@dataclass(frozen=True)
class Checked:
    """The properties of one recipe and its data."""

    recipe: str  # path, or name of a shipped one
    training: DataReport
    sharing: Sharing | None  # None if every example is computed separately
    sharing_reason: Reason
    held_out: HeldOut | None  # None without data.eval
    repeats: Repeats

    def to_json_dict(self) -> dict[str, Any]:
        training, repeats = self.training, self.repeats
        held_out = self.held_out and self.held_out.to_json_dict() | {"num_in_training": repeats.num_in_training}
        return {
            "recipe": self.recipe,
            "num_rows": training.num_rows,
            "num_left_out": training.num_left_out,
            "num_dropped": training.num_dropped,
            "num_bad": training.num_bad,
            "format": training.format,
            "format_reason": training.format_reason,
            "notes": list(training.notes),
            "truncation": [asdict(line) for line in training.truncation],
            "rows": [asdict(row) for row in training.rows],
            "proposed_max_seq_length": training.proposed_max_seq_length,
            "reason": training.reason,
            "sharing": self.sharing and self.sharing.to_json_dict(),
            "sharing_reason": self.sharing_reason.decision,
            "eval": held_out,
            "num_repeated": repeats.num_repeated,
        }


def check(recipes: Sequence[str], overrides: Sequence[str]) -> list[Checked]:
    """Check each recipe in turn; see `check_recipe`."""
    return [check_recipe(load_recipe(name, overrides=overrides)) for name in recipes]


def check_recipe(recipe: Recipe) -> Checked:
    """Check one recipe: keys, three rendered rows, lengths, sharing, held-out rows. Raises UserError when no row could be trained."""
    show.say(f"{recipe.path or recipe.name}: the recipe is well-formed", style="bold")
    for note in recipe.notes:
        show.say(str(note))
    source = find_base(recipe.model.base, cache=default_cache(), revision=recipe.model.revision)
    config = load_config(source)
    refuse_wrong_modules(recipe, config)
    tokenizer = load_tokenizer(source, special_tokens=recipe.data.special_tokens)
    reading = reading_of(recipe, source)
    asked = recipe.data.max_seq_length
    inspected = inspect_rows(
        recipe.data.train_files,
        tokenizer,
        reading,
        max_seq_length=asked if isinstance(asked, int) else None,
        limit=context_window(config),
    )
    _show_training_rows(inspected)
    if inspected.num_rows and inspected.num_dropped >= inspected.num_rows:
        raise UserError(
            f"data.max_seq_length: at {asked} tokens every row would lose its labels. Use {inspected.proposed_max_seq_length}, or auto"
        )
    length = asked if isinstance(asked, int) else inspected.proposed_max_seq_length
    shared, sharing_reason = what_is_shared(recipe, source)
    show.say(str(sharing_reason))
    eval_rows = None if recipe.data.eval is None else _held_out(recipe, recipe.data.eval, source, tokenizer, length)
    held_out = None if eval_rows is None else _check_held_out(recipe, eval_rows)
    examples = load_examples(
        recipe.data.train_files, tokenizer, reading, max_seq_length=length, cache_dir=default_cache() / TOKENIZED
    )
    repeats = find_repeats(examples, eval_rows)
    for sentence in repeats.sentences:
        show.say_warning(sentence)
    return Checked(
        recipe=str(recipe.path or recipe.name),
        training=inspected,
        sharing=shared,
        sharing_reason=sharing_reason,
        held_out=held_out,
        repeats=repeats,
    )


def _show_training_rows(inspected: DataReport) -> None:
    for row in inspected.bad:
        show.say_warning(f"bad row, left out: {row}")
    show.show_rows([(row.id, row.tokens) for row in inspected.rows])
    show.show_truncation(inspected.truncation)
    show.say(f"format: {inspected.format} ({inspected.format_reason})")
    if inspected.num_left_out:
        total = inspected.num_rows + inspected.num_left_out
        show.say(f"the first {inspected.num_rows:,} of {total:,} rows; data.num_train: null takes all")
    show.say(
        f"{inspected.num_rows} rows, {inspected.num_dropped} dropped; template: {inspected.template}; stop token: {inspected.stop_token}"
    )
    for note in inspected.notes:
        show.say(note)
    show.say(f"proposed data.max_seq_length: {inspected.proposed_max_seq_length} ({inspected.reason})")


def _held_out(recipe: Recipe, file: str, source: Path, tokenizer: Any, trained_length: int) -> Examples:
    """The rows of data.eval that scoring will use, chosen by scoring's own code."""
    window = context_window(load_config(source))
    longest, reason = longest_scored(recipe.eval.max_seq_length, window=window, trained_length=trained_length)
    show.say(f"eval.max_seq_length: {longest}, {reason}")
    return held_out_rows(
        file,
        tokenizer,
        replace(reading_of(recipe, source), format=_trained_format(recipe), num_rows=recipe.eval.num_examples),
        max_seq_length=longest,
        text_length=trained_length,
        window=window,
        cache_dir=default_cache() / TOKENIZED,
    )


def _trained_format(recipe: Recipe) -> str:
    return find_format(recipe.data.train_files, format=recipe.data.format)[0]


def _check_held_out(recipe: Recipe, rows: Examples) -> HeldOut:
    counts, left_out = rows.counts, left_out_of(rows)
    assert recipe.data.eval is not None
    format = format_of_held_out(recipe.data.eval, format=_trained_format(recipe))
    for row in counts.bad:
        show.say_warning(f"data.eval: bad row, left out: {row}")
    num_scored = counts.num_read - counts.num_dropped
    show.say(f"data.eval: {num_scored} rows are scored, {left_out.total} are not; format: {format}")
    for sentence in account_of(rows, "data.eval"):
        show.say(sentence)
    return HeldOut(counts, left_out, format)
