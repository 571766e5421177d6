"""The verb `check` for one recipe: everything short of training, shown, and as what `--json` prints."""

from dataclasses import asdict
from typing import Any

from qlora_lite import show
from qlora_lite.data.inspect import inspect_rows
from qlora_lite.data.read import find_format, format_of_held_out
from qlora_lite.data.template import Vocabulary
from qlora_lite.errors import UserError
from qlora_lite.model.base import load_tokenizer
from qlora_lite.model.bring import default_cache
from qlora_lite.model.source import context_window, find_base, load_config
from qlora_lite.plan import what_is_shared
from qlora_lite.recipe import Recipe


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Well-formed or not, three rendered rows, lengths, sharing, held-out rows. Raises UserError where nothing could be trained."""
    show.say(f"{recipe.path or recipe.name}: the recipe is well-formed", style="bold")
    for note in recipe.notes:
        show.say(note)
    source = find_base(recipe.model.base, cache=default_cache(), revision=recipe.model.revision)
    tokenizer = load_tokenizer(source, special_tokens=recipe.data.special_tokens)
    vocabulary = Vocabulary.of(load_config(source), recipe.data.special_tokens)
    asked = recipe.data.max_seq_length
    found = inspect_rows(
        recipe.data.train_files,
        tokenizer,
        format=recipe.data.format,
        num_rows=recipe.data.num_train,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=asked if isinstance(asked, int) else None,
        limit=context_window(load_config(source)),
        vocabulary=vocabulary,
    )
    for row in found.bad:
        show.say_warning(f"bad row, left out: {row}")
    show.show_rows([(row.id, row.tokens) for row in found.rows])
    show.show_truncation(found.truncation)
    show.say(f"format: {found.format} ({found.format_reason})")
    if found.num_left_out:
        total = found.num_rows + found.num_left_out
        show.say(f"the first {found.num_rows:,} of {total:,} rows; data.num_train: null takes all")
    show.say(
        f"{found.num_rows} rows, {found.num_dropped} dropped; template: {found.template}; stop token: {found.stop_token}"
    )
    for note in found.notes:
        show.say(note)
    show.say(f"proposed data.max_seq_length: {found.proposed_max_seq_length} ({found.reason})")
    if found.num_rows and found.num_dropped >= found.num_rows:
        raise UserError(
            f"data.max_seq_length: at {asked} tokens every row would lose its labels. Use {found.proposed_max_seq_length}, or auto"
        )
    length = asked if isinstance(asked, int) else found.proposed_max_seq_length
    shared, sharing_reason = what_is_shared(recipe, source)
    show.say(f"data.share_prefixes: {sharing_reason}")
    return {
        "recipe": str(recipe.path or recipe.name),
        "num_rows": found.num_rows,
        "num_left_out": found.num_left_out,
        "num_dropped": found.num_dropped,
        "num_bad": found.num_bad,
        "format": found.format,
        "format_reason": found.format_reason,
        "notes": list(found.notes),
        "truncation": [asdict(line) for line in found.truncation],
        "rows": [asdict(row) for row in found.rows],
        "proposed_max_seq_length": found.proposed_max_seq_length,
        "reason": found.reason,
        "sharing": shared and shared.to_json_dict(),
        "sharing_reason": sharing_reason,
        "eval": None
        if recipe.data.eval is None
        else _check_held_out(recipe, recipe.data.eval, tokenizer, vocabulary, length),
    }


def _check_held_out(
    recipe: Recipe, file: str, tokenizer: Any, vocabulary: Vocabulary, max_seq_length: int
) -> dict[str, Any]:
    """What scoring will make of data.eval."""
    trained_format, _ = find_format(recipe.data.train_files, format=recipe.data.format)
    found = inspect_rows(
        file,
        tokenizer,
        format=format_of_held_out(file, format=trained_format),
        num_rows=recipe.eval.num_examples,
        no_answer_text=recipe.data.no_answer_text,
        max_seq_length=max_seq_length,
        vocabulary=vocabulary,
    )
    for row in found.bad:
        show.say_warning(f"data.eval: bad row, left out: {row}")
    show.say(f"data.eval: {found.num_rows} rows, {found.num_dropped} dropped; format: {found.format}")
    for note in found.notes:
        show.say(f"data.eval: {note}")
    if found.num_dropped >= found.num_rows:
        raise UserError(
            f"{file}: at data.max_seq_length={max_seq_length} every held-out row would lose its answer. Raise it to "
            f"{found.proposed_max_seq_length}, or set data.eval to null"
        )
    return {
        "num_rows": found.num_rows,
        "num_dropped": found.num_dropped,
        "num_bad": found.num_bad,
        "format": found.format,
        "notes": list(found.notes),
    }
