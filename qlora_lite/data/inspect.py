"""The data report of `check`: rendered rows with trained tokens marked, and the rows cut or dropped at each sequence length.

In: data files and a tokenizer, no weights. Out: `DataReport`. Each row has two lengths, full and shortest possible, which decide for
any `max_seq_length` whether the row fits, is cut, or is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from qlora_lite.data.examples import Reading
from qlora_lite.data.fit import RowFitter, TemplateNotes, fit_row, least_tokens
from qlora_lite.data.read import Mix, Source, find_format, read_mix
from qlora_lite.data.rows import QuestionRow, Row
from qlora_lite.data.template import ChatTemplate, Encoded, Tokenizer

TEXT_TOKENS = 1024  # proposed for plain text, which loses nothing in pieces
TABLE_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
NUM_SHOWN = 3
_OUTLIERS_OF_ANY = "lose context, or are left out if there is no passage to shorten"
_OUTLIERS = {
    "squad": "lose context",
    **dict.fromkeys(("chat", "sharegpt", "prompt_completion", "alpaca"), "are left out"),
    "text": "are cut in pieces",
}


@dataclass(frozen=True)
class TruncationLine:
    """The rows by outcome at one sequence length; the three counts sum to the number of rows."""

    max_seq_length: int
    num_whole: int  # fit unchanged
    num_cut: int  # lose some context, never question or answer; plain text: cut in pieces, without loss
    num_dropped: int  # too long and not shortenable


@dataclass(frozen=True)
class RenderedRow:
    """One training row (the first example it makes) as text: (token text, whether it is trained) for every token, in order."""

    id: str
    tokens: tuple[tuple[str, bool], ...]
    num_tokens: int
    was_cut: bool


@dataclass(frozen=True)
class DataReport:
    """The properties of the data that are known without weights."""

    num_rows: int  # usable rows taken from the files, at most `num_rows` of the call
    num_dropped: int  # of these, dropped at the sequence length in use (the given or the proposed one)
    num_left_out: int  # usable rows beyond the requested number
    num_bad: int  # unusable rows in the whole files, and rows taken that the template cannot render
    bad: tuple[str, ...]  # the first of them, named, with reasons
    format: str
    format_reason: str
    template: str  # "the tokenizer's chat template" or "plain"
    notes: tuple[str, ...]  # unused columns, changes to rows by the template; one sentence each
    stop_token: str
    max_tokens: int  # of the longest row, uncut
    truncation: tuple[TruncationLine, ...]
    rows: tuple[RenderedRow, ...]
    proposed_max_seq_length: int
    reason: str


def inspect_rows(
    source: Source,
    tokenizer: Tokenizer,
    reading: Reading = Reading(),
    *,
    max_seq_length: int | None,
    limit: int | None = None,
) -> DataReport:
    """Report on the first `num_rows` usable rows (None: all) of one or several weighted files.

    `max_seq_length` None uses the proposal; `limit` is the model's context window in tokens, the upper bound of a proposal.
    Raises DataError as `load_examples` does for bad rows, ModelError when the tokenizer's template is unusable.
    """
    mix = read_mix(source, format=reading.format, num_rows=reading.num_rows, max_bad_share=reading.max_bad_share)
    template = ChatTemplate(tokenizer, reading.vocabulary)
    rows = _measure_rows(mix, template, reading)
    whole_B, shortest_B, unanswerable_B = (np.array(column) for column in zip(*rows.measures, strict=True))
    proposed, reason = propose_max_seq_length(
        whole_B, limit=limit, is_text=mix.format == "text", outliers=_OUTLIERS.get(mix.format, _OUTLIERS_OF_ANY)
    )
    used = max_seq_length or proposed
    tried = sorted({*TABLE_LENGTHS, used, int(whole_B.max())})
    table = {length: _truncation_line(length, whole_B, shortest_B) for length in tried}
    shown = [rows.positions[i] for i in _choose_rows(whole_B, shortest_B, unanswerable_B, used)]
    is_nested = all(file.kind == "squad" for file in mix.files)
    version = "v2.0" if unanswerable_B.any() else "v1.1"
    return DataReport(
        num_rows=len(whole_B),
        num_left_out=mix.num_left_out,
        num_dropped=table[used].num_dropped,
        num_bad=rows.num_bad,
        bad=rows.bad,
        format=f"SQuAD {version} JSON" if is_nested else mix.format,
        format_reason=find_format(source, format=reading.format)[1],
        template=template.name,
        notes=(*mix.notes, *rows.notes),
        stop_token=str(tokenizer.convert_ids_to_tokens(template.stop_token_id)),
        max_tokens=int(whole_B.max()),
        truncation=tuple(table.values()),
        rows=tuple(
            _render_row(template, row, reading.no_answer_text, used)
            for position, row in enumerate(islice(mix, max(shown, default=-1) + 1))
            if position in shown
        ),
        proposed_max_seq_length=proposed,
        reason=reason,
    )


@dataclass(frozen=True)
class _Measured:
    """The rows that the template renders, and what happened to the others."""

    positions: list[int]
    measures: list[tuple[int, int, bool]]  # tokens uncut, tokens at least, whether the row is unanswerable
    num_bad: int
    bad: tuple[str, ...]
    notes: tuple[str, ...]


def _measure_rows(mix: Mix, template: ChatTemplate, reading: Reading) -> _Measured:
    """Raises DataError for too many bad rows."""
    text, notes = reading.no_answer_text, TemplateNotes()
    fitter = RowFitter(mix, template, no_answer_text=text, max_seq_length=None, max_bad_share=reading.max_bad_share)
    positions, measures = [], []
    for position, row in enumerate(mix):
        fitted = fitter.fit(row)
        if fitted is None:
            continue
        examples, _ = fitted
        whole = max(len(example.encoded.input_ids) for example in examples)
        least = least_tokens(template, row, whole, no_answer_text=text)
        positions.append(position)
        measures.append((whole, least, isinstance(row, QuestionRow) and not row.answers))
        notes.count(template, row, examples)
    fitter.refuse_too_many()
    return _Measured(positions, measures, fitter.num_bad, fitter.bad, tuple(notes.sentences))


def propose_max_seq_length(
    lengths_B: Sequence[int] | np.ndarray,
    *,
    limit: int | None = None,
    is_text: bool = False,
    outliers: str = _OUTLIERS_OF_ANY,
) -> tuple[int, str]:
    """Tokens per row, uncut -> (`max_seq_length`, reason).

    The smallest multiple of 64 that fits every row; or 99.5% of them if the longest row is more than twice as long as those.
    At most `limit`, the model's context window; for plain text at most TEXT_TOKENS. `outliers` describes the fate of longer rows.
    Raises ValueError when there are no rows.
    """
    if len(lengths_B) == 0:
        raise ValueError("no rows: cannot propose a sequence length")
    ordered = np.sort(np.asarray(lengths_B))
    longest = int(ordered[-1])
    nearly_all = int(ordered[-(-len(ordered) * 995 // 1000) - 1])
    held = longest if longest <= 2 * nearly_all else nearly_all
    proposed = -(-held // 64) * 64
    if is_text and proposed > TEXT_TOKENS:
        return min(
            TEXT_TOKENS, limit or TEXT_TOKENS
        ), f"plain text is cut in pieces; the longest text has {longest} tokens"
    if limit is not None and proposed > limit:
        return limit, f"the model's context window is {limit} tokens; the longest row has {longest}"
    if held == longest:
        return proposed, f"the smallest multiple of 64 that fits every row; the longest has {longest} tokens"
    num_longer = int((ordered > proposed).sum())
    return proposed, (
        f"the smallest multiple of 64 that fits 99.5% of the rows; {num_longer} outliers of up to {longest} tokens {outliers}"
    )


def render_tokens(tokenizer: Tokenizer, encoded: Encoded) -> tuple[tuple[str, bool], ...]:
    """Return (text, is trained) of every token. A character of several tokens appears at the last of them."""
    ids = encoded.input_ids
    trained = {position + 1 for position in encoded.predictors}
    shown: list[tuple[str, bool]] = []
    # Decode with the previous piece in front, because SentencePiece drops a leading space (the method of TGI's streamer).
    before, start = 0, 0
    for position in range(len(ids)):
        previous = _decode(tokenizer, ids[before:start])
        text = _decode(tokenizer, ids[before : position + 1])
        is_complete = not text.endswith("\ufffd") or position == len(ids) - 1
        shown.append((text[len(previous) :] if is_complete else "", position in trained))
        if is_complete:
            before, start = start, position + 1
    return tuple(shown)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _truncation_line(max_seq_length: int, whole_B: np.ndarray, shortest_B: np.ndarray) -> TruncationLine:
    num_whole = int((whole_B <= max_seq_length).sum())
    num_dropped = int(((shortest_B > max_seq_length) & (whole_B > max_seq_length)).sum())
    return TruncationLine(max_seq_length, num_whole, len(whole_B) - num_whole - num_dropped, num_dropped)


def _choose_rows(
    whole_B: np.ndarray, shortest_B: np.ndarray, unanswerable_B: np.ndarray, max_seq_length: int
) -> list[int]:
    """Choose NUM_SHOWN rows: the first, the first that loses context, the first unanswerable one, then more from the start."""
    kept = (whole_B <= max_seq_length) | (shortest_B <= max_seq_length)
    kinds = (kept, kept & (whole_B > max_seq_length), kept & unanswerable_B)
    chosen = [int(np.flatnonzero(kind)[0]) for kind in kinds if kind.any()]
    chosen += np.flatnonzero(kept)[:NUM_SHOWN].tolist()
    return sorted(list(dict.fromkeys(chosen))[:NUM_SHOWN])


def _render_row(template: ChatTemplate, row: Row, no_answer_text: str, max_seq_length: int) -> RenderedRow:
    examples, was_cut = fit_row(template, row, no_answer_text=no_answer_text, max_seq_length=max_seq_length)
    assert examples, "only rows that fit are chosen"
    encoded = examples[0].encoded
    return RenderedRow(
        id=row.id,
        tokens=render_tokens(template.tokenizer, encoded),
        num_tokens=len(encoded.input_ids),
        was_cut=was_cut,
    )
