"""What `check` says about a data file: rendered rows with the trained tokens marked, and what each sequence length would cost.

In: a SQuAD file and a tokenizer, no weights. Out: `DataReport`. Every row is tokenized twice: whole, and with nothing of its context but
the answer; these two lengths say for any `max_seq_length` whether the row fits, loses context, or has to be dropped.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from qlora_lite.data.examples import fit_row
from qlora_lite.data.squad import QuestionRow, read_squad
from qlora_lite.data.template import AnswerFormat, Encoded, Tokenizer, encode_row, read_answer_format

TABLE_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
NUM_SHOWN = 3


@dataclass(frozen=True)
class TruncationLine:
    """What becomes of the rows at one sequence length; the three counts sum to the number of rows."""

    max_seq_length: int
    num_whole: int  # fit as they are
    num_cut: int  # lose some of their context, never question or answer
    num_dropped: int  # question, answer and template alone are too long


@dataclass(frozen=True)
class RenderedRow:
    """One training row as text: (token text, whether it is trained) for every token, in order."""

    id: str
    tokens: tuple[tuple[str, bool], ...]
    num_tokens: int
    was_cut: bool
    is_answerable: bool


@dataclass(frozen=True)
class DataReport:
    """All that can be said about the data before a weight is loaded."""

    num_rows: int  # usable rows taken from the file, at most `num_rows` of the call
    num_dropped: int  # of these, lost at the sequence length in use (the given one, or the proposed one)
    num_bad: int  # unusable rows in the whole file
    bad: tuple[str, ...]  # the first of them, named, with reasons
    format: str
    template: str  # "the tokenizer's chat template" or "plain"
    stop_token: str
    max_tokens: int  # of the longest row, uncut
    truncation: tuple[TruncationLine, ...]
    rows: tuple[RenderedRow, ...]
    proposed_max_seq_length: int
    reason: str


def inspect_rows(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    num_rows: int | None,
    no_answer_text: str,
    max_seq_length: int | None,
    limit: int | None = None,
    max_bad_share: float = 0.02,
) -> DataReport:
    """Look at the first `num_rows` usable rows (None: all) of a SQuAD file.

    `max_seq_length` None means "use the proposal"; `limit` is the model's context window in tokens, which a proposal never exceeds.
    Raises DataError as `read_squad` does, ModelError when the tokenizer's template is unusable.
    """
    source = read_squad(path, max_bad_share=max_bad_share)
    answer_format = read_answer_format(tokenizer)
    whole, shortest, unanswerable = [], [], []
    for row in islice(source, num_rows):
        answer = row.answers[0] if row.answers else ""
        whole.append(_num_tokens(tokenizer, row, no_answer_text, answer_format))
        shortest.append(_num_tokens(tokenizer, replace(row, context=answer), no_answer_text, answer_format))
        unanswerable.append(not row.answers)
    whole_B, shortest_B = np.array(whole), np.array(shortest)
    proposed, reason = propose_max_seq_length(whole_B, limit=limit)
    used = max_seq_length or proposed
    lengths = sorted({*TABLE_LENGTHS, used, int(whole_B.max())})
    table = {length: _truncation_line(length, whole_B, shortest_B) for length in lengths}
    shown = _choose_rows(whole_B, shortest_B, np.array(unanswerable), used)
    return DataReport(
        num_rows=len(whole),
        num_dropped=table[used].num_dropped,
        num_bad=source.num_bad,
        bad=source.bad,
        format=f"SQuAD {'v2.0' if any(unanswerable) else 'v1.1'} JSON",
        template=answer_format.name,
        stop_token=str(tokenizer.convert_ids_to_tokens(answer_format.stop_token_id)),
        max_tokens=int(whole_B.max()),
        truncation=tuple(table.values()),
        rows=tuple(
            _render_row(tokenizer, row, no_answer_text, used, answer_format)
            for index, row in enumerate(islice(source, max(shown, default=-1) + 1))
            if index in shown
        ),
        proposed_max_seq_length=proposed,
        reason=reason,
    )


def propose_max_seq_length(lengths_B: Sequence[int] | np.ndarray, *, limit: int | None = None) -> tuple[int, str]:
    """Tokens per row, uncut -> (`max_seq_length`, reason).

    The smallest multiple of 64 that holds every row; or 99.5% of them when the longest row is more than twice as long as all those.
    Never above `limit`, the model's context window. Raises ValueError when there are no rows.
    """
    if len(lengths_B) == 0:
        raise ValueError("no rows to propose a sequence length for")
    ordered = np.sort(np.asarray(lengths_B))
    longest = int(ordered[-1])
    nearly_all = int(ordered[-(-len(ordered) * 995 // 1000) - 1])
    held = longest if longest <= 2 * nearly_all else nearly_all
    proposed = -(-held // 64) * 64
    if limit is not None and proposed > limit:
        return limit, f"the model's context window is {limit} tokens; the longest row has {longest}"
    if held == longest:
        return proposed, f"the smallest multiple of 64 that holds every row; the longest has {longest} tokens"
    num_longer = int((ordered > proposed).sum())
    return proposed, (
        f"the smallest multiple of 64 that holds 99.5% of the rows; {num_longer} outliers of up to {longest} tokens lose context"
    )


def render_tokens(tokenizer: Tokenizer, encoded: Encoded) -> tuple[tuple[str, bool], ...]:
    """(text, is trained) of every token. A character that spans several tokens shows at the last of them."""
    ids = encoded.input_ids
    shown: list[tuple[str, bool]] = []
    # Decode with one emitted piece before, because SentencePiece drops a space at the very start (the method of TGI's streamer).
    before, start = 0, 0
    for position in range(len(ids)):
        previous = _decode(tokenizer, ids[before:start])
        text = _decode(tokenizer, ids[before : position + 1])
        is_complete = not text.endswith("\ufffd") or position == len(ids) - 1
        shown.append((text[len(previous) :] if is_complete else "", position >= encoded.label_start))
        if is_complete:
            before, start = start, position + 1
    return tuple(shown)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _num_tokens(tokenizer: Tokenizer, row: QuestionRow, no_answer_text: str, answer_format: AnswerFormat) -> int:
    encoded = encode_row(tokenizer, row, no_answer_text=no_answer_text, answer_format=answer_format)
    return len(encoded.input_ids)


def _truncation_line(max_seq_length: int, whole_B: np.ndarray, shortest_B: np.ndarray) -> TruncationLine:
    num_whole = int((whole_B <= max_seq_length).sum())
    num_dropped = int(((shortest_B > max_seq_length) & (whole_B > max_seq_length)).sum())
    return TruncationLine(max_seq_length, num_whole, len(whole_B) - num_whole - num_dropped, num_dropped)


def _choose_rows(
    whole_B: np.ndarray, shortest_B: np.ndarray, unanswerable_B: np.ndarray, max_seq_length: int
) -> list[int]:
    """The first row, the first that loses context, the first unanswerable one; then as many from the start as are missing."""
    kept = (whole_B <= max_seq_length) | (shortest_B <= max_seq_length)
    kinds = (kept, kept & (whole_B > max_seq_length), kept & unanswerable_B)
    wanted = [int(np.flatnonzero(kind)[0]) for kind in kinds if kind.any()]
    wanted += np.flatnonzero(kept)[:NUM_SHOWN].tolist()
    return sorted(list(dict.fromkeys(wanted))[:NUM_SHOWN])


def _render_row(
    tokenizer: Tokenizer, row: QuestionRow, no_answer_text: str, max_seq_length: int, answer_format: AnswerFormat
) -> RenderedRow:
    fitted = fit_row(
        tokenizer, row, no_answer_text=no_answer_text, max_seq_length=max_seq_length, answer_format=answer_format
    )
    assert fitted is not None, "only rows that fit are chosen"
    encoded, was_cut = fitted
    return RenderedRow(
        id=row.id,
        tokens=render_tokens(tokenizer, encoded),
        num_tokens=len(encoded.input_ids),
        was_cut=was_cut,
        is_answerable=bool(row.answers),
    )
