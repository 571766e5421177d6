"""Choose the rows that are scored: the one place for it, for every verb that scores and for the plan.

In: a file, and the length of the longest row that is scored. Out: `Examples`, and `left_out_of` them: rows that are too long, unusable,
or beyond the requested number.

Scoring has its own limit, `eval.max_seq_length`: training cuts rows so that a step fits, and a score should not depend on that.
Surprising: a question is never cut here, because the kept part would reveal the position of the answer; a question that is too long is
left out. A text loses nothing by cutting, so it is scored in training's pieces.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data.examples import Examples, Reading, load_examples
from qlora_lite.data.read import format_of_held_out
from qlora_lite.errors import DataError

KEY = "eval.max_seq_length"


@dataclass(frozen=True)
class LeftOut:
    """Numbers of rows that were not scored, by reason."""

    too_long: int = 0  # longer than eval.max_seq_length
    unusable: int = 0  # bad rows of the file
    beyond_limit: int = 0  # after the first eval.num_examples

    @property
    def total(self) -> int:
        return self.too_long + self.unusable + self.beyond_limit

    def to_json_dict(self) -> dict[str, Any]:
        return {"num_left_out": self.total, "left_out": asdict(self)}


def longest_scored(asked: int | Literal["auto"], *, window: int | None, trained_length: int) -> tuple[int, str]:
    """-> (the value of eval.max_seq_length, its reason). Raises DataError for more positions than the model has."""
    if asked != "auto":
        if window is not None and asked > window:
            raise DataError(
                f"{KEY}: {asked} is more than the model's {window} positions. Use at most {window}, or auto"
            )
        return asked, "asked for"
    if window is None:
        return trained_length, "data.max_seq_length, because the model's config names no context window"
    return window, "the model's context window"


def held_out_rows(
    file: Path | str,
    tokenizer: Any,
    reading: Reading,
    *,
    max_seq_length: int,
    text_length: int,
    window: int | None,
    cache_dir: Path,
) -> Examples:
    """The rows of `file` that are scored: the first `num_rows` usable ones (None: all) of at most `max_seq_length` tokens.

    `text_length` is the length of training's pieces of a text. A file without the columns of `format` has the format of its own columns.
    Raises DataError, also when every row is too long.
    """
    file_format = format_of_held_out(file, format=reading.format)
    examples = load_examples(
        file,
        tokenizer,
        replace(reading, format=file_format),
        max_seq_length=min(max_seq_length, text_length) if file_format == "text" else max_seq_length,
        cache_dir=cache_dir,
        may_cut=False,
    )
    if len(examples) == 0:
        raise DataError(
            f"{file}: all {examples.counts.num_read:,} usable rows are longer than {KEY} ({max_seq_length} tokens), so there "
            f"is nothing to score. {_advice(max_seq_length, window)}"
        )
    return examples


def left_out_of(examples: Examples) -> LeftOut:
    counts = examples.counts
    return LeftOut(too_long=counts.num_dropped, unusable=counts.num_bad, beyond_limit=counts.num_left_out)


def account_of(examples: Examples, name: str = "held-out rows") -> list[str]:
    """One sentence, beginning with `name`, for each group of rows that are not scored; [] when all are."""
    # A text is scored in training's pieces.
    length_key = "data.max_seq_length" if examples.is_text else KEY
    return examples.account(name, limit="eval.num_examples", length_key=length_key)


def _advice(max_seq_length: int, window: int | None) -> str:
    if window is None or max_seq_length < window:
        most = "" if window is None else f", at most {window}"
        return f"Raise it with --set {KEY}=N{most}"
    return "That is the model's context window: shorten the rows, or score another file"
