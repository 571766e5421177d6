"""Tokenized examples on disk: written once per (file, tokenizer, settings), memory-mapped afterwards.

In: a SQuAD file and a tokenizer. Out: `Examples`, whose rows lie in an Arrow file at `cache_dir/<fingerprint>/`. They are streamed there
through a staging folder and one rename, so data may be larger than memory and a killed run leaves nothing half-written to be found.

Surprising:
- A row longer than `max_seq_length` loses *context* only, first where it reaches farther from the answer; never question, answer or
  template. A row whose question and answer alone are too long is dropped and counted; no row is without labels.
- `row(i)` has the whole context even then: it is what evaluation asks about.
- The cache is checked by SHA-256 and rewritten when it is damaged.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lite.data.squad import QuestionRow, open_data_file, read_squad
from qlora_lite.data.template import (
    AnswerFormat,
    Encoded,
    Tokenizer,
    encode_row,
    read_answer_format,
    tokenizer_identity,
)
from qlora_lite.errors import DataError

CODE_VERSION = 1  # raise it when the same file and tokenizer should give other rows
_SNAP_CHARS = 24  # a shortened context moves to a word boundary when one is this near
_WRITE_ROWS = 256  # rows held in memory while writing


@dataclass(frozen=True)
class ReadCounts:
    """What happened to the rows of the file on their way to examples."""

    num_read: int  # usable rows that were taken from the file
    num_cut: int  # of these, kept with a shortened context
    num_dropped: int  # of these, left out: question and answer alone exceed max_seq_length
    num_bad: int  # unusable rows in the whole file
    bad: tuple[str, ...]  # the first of them, named, with reasons
    dropped: tuple[str, ...]  # ids of the first dropped rows


class Examples:
    """Tokenized rows by index, memory-mapped. `lengths` and `num_label_tokens` are numpy int64 arrays [num examples]."""

    def __init__(self, dataset: Any, *, counts: ReadCounts, fingerprint: str, max_seq_length: int | None) -> None:
        self.dataset = dataset  # datasets.Dataset: input_ids, label_start, id, question, context, answers, answer_start
        self.counts = counts
        self.fingerprint = fingerprint
        self.max_seq_length = max_seq_length
        column = dataset.data.column  # whole columns without building Python objects
        self.lengths = column("num_tokens").to_numpy().astype(np.int64)
        self.num_label_tokens = self.lengths - column("label_start").to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_dropped(self) -> int:
        """Rows left out because question and answer alone exceed `max_seq_length`."""
        return self.counts.num_dropped

    @property
    def num_cut(self) -> int:
        """Rows kept with a shortened context."""
        return self.counts.num_cut

    def encoded(self, index: int) -> Encoded:
        """Token ids of example `index` (possibly with a shortened context)."""
        return Encoded(self._column("input_ids", index), label_start=self._column("label_start", index))

    def row(self, index: int) -> QuestionRow:
        """The question as it is in the file: whole context, all gold answers."""
        values = {name: self._column(name, index) for name in ("id", "context", "question", "answers", "answer_start")}
        return QuestionRow(**values | {"answers": tuple(values["answers"])})

    def _column(self, name: str, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is outside 0 to {len(self) - 1}")
        return self.dataset.data.column(name)[int(index)].as_py()


def load_examples(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    num_rows: int | None,
    no_answer_text: str,
    max_seq_length: int | None,
    cache_dir: str | os.PathLike[str],
    max_bad_share: float = 0.02,
) -> Examples:
    """Tokenize the first `num_rows` usable rows of a SQuAD file (None: all), or map what an earlier call wrote.

    `max_seq_length` is in tokens (None: no limit). Raises DataError when the file is unusable (see `read_squad`), when every row is too
    long even without its context, or when the cache cannot be written; ModelError when the tokenizer's template is unusable.
    """
    for name, number in (("num_rows", num_rows), ("max_seq_length", max_seq_length)):
        if number is not None and number < 1:
            raise DataError(f"{name}: expected a whole number above 0, got {number}")
    if not no_answer_text.strip():
        raise DataError(
            "no_answer_text: empty, so an unanswerable row would have no answer to train on. Give it a word."
        )
    path, cache_dir = Path(path), Path(cache_dir)
    settings = {
        "code_version": CODE_VERSION,
        "tokenizer": tokenizer_identity(tokenizer),
        "num_rows": num_rows,
        "no_answer_text": no_answer_text,
        "max_seq_length": max_seq_length,
        "max_bad_share": max_bad_share,
        "data": _hash_file(path),
    }
    fingerprint = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_dir / fingerprint
    counts = _read_cache(folder)
    if counts is None:
        source = read_squad(path, max_bad_share=max_bad_share)
        rows = _TokenizedRows(islice(source, num_rows), tokenizer, no_answer_text, max_seq_length)
        try:
            counts = _write_cache(folder, rows, fingerprint, bad=(source.num_bad, source.bad))
        except OSError as error:
            raise DataError(
                f"{cache_dir}: the tokenized rows cannot be written: {error.strerror or error}. "
                f"Free space or choose another cache folder."
            ) from error
    if counts.num_read == counts.num_dropped:
        raise DataError(
            f"{path}: every one of the {counts.num_read} rows would lose its answer: question, answer and template alone exceed "
            f"max_seq_length={max_seq_length}. Raise data.max_seq_length."
        )
    return Examples(_map(folder), counts=counts, fingerprint=fingerprint, max_seq_length=max_seq_length)


def fit_row(
    tokenizer: Tokenizer,
    row: QuestionRow,
    *,
    no_answer_text: str,
    max_seq_length: int | None,
    answer_format: AnswerFormat | None = None,
) -> tuple[Encoded, bool] | None:
    """Encode a row within `max_seq_length` tokens: -> (encoded, whether its context was shortened), or None when it cannot fit.

    Of a too long context the largest window that fits is kept: it holds the first gold answer and is cut where the answer is farther.
    """
    answer_format = answer_format or read_answer_format(tokenizer)

    def encode(context: str) -> Encoded:
        shorter = replace(row, context=context)
        return encode_row(tokenizer, shorter, no_answer_text=no_answer_text, answer_format=answer_format)

    whole = encode(row.context)
    if max_seq_length is None or len(whole.input_ids) <= max_seq_length:
        return whole, False
    answer = row.answers[0] if row.answers else ""
    start = row.answer_start if row.answer_start is not None else max(0, row.context.find(answer))
    end = start + len(answer)
    best: Encoded | None = None
    # Binary search for the most characters that still fit; tokens grow with characters, nearly always.
    low, high = len(answer), len(row.context) - 1
    while low <= high:
        num_chars = (low + high) // 2
        encoded = encode(_window(row.context, start, end, num_chars))
        if len(encoded.input_ids) <= max_seq_length:
            best, low = encoded, num_chars + 1
        else:
            high = num_chars - 1
    return None if best is None else (best, True)


def _window(context: str, start: int, end: int, num_chars: int) -> str:
    """At most `num_chars` characters of `context` that hold [start, end); the longer side is cut first, at word boundaries if near."""
    spare = num_chars - (end - start)
    before, after = start, len(context) - end  # characters on each side of the answer
    keep_before = min(before, max(spare // 2, spare - after))
    keep_after = min(after, spare - keep_before)
    left, right = start - keep_before, end + keep_after
    if left > 0 and not context[left - 1].isspace():
        snapped = next((i for i in range(left, min(left + _SNAP_CHARS, start)) if context[i].isspace()), left)
        left = snapped
    if right < len(context) and not context[right].isspace():
        snapped = next((i for i in range(right, max(right - _SNAP_CHARS, end), -1) if context[i - 1].isspace()), right)
        right = snapped
    # Whitespace at a cut goes too, but never a character of the answer.
    while left < start and left > 0 and context[left].isspace():
        left += 1
    while right > end and right < len(context) and context[right - 1].isspace():
        right -= 1
    return context[left:right]


class _TokenizedRows:
    """Iterates once over the records to write, and counts what happens to the rows on the way."""

    def __init__(
        self, rows: Iterator[QuestionRow], tokenizer: Tokenizer, no_answer_text: str, max_seq_length: int | None
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.no_answer_text = no_answer_text
        self.max_seq_length = max_seq_length
        self.num_read = self.num_cut = self.num_dropped = 0
        self.dropped: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        answer_format = read_answer_format(self.tokenizer)
        for row in self.rows:
            self.num_read += 1
            fitted = fit_row(
                self.tokenizer,
                row,
                no_answer_text=self.no_answer_text,
                max_seq_length=self.max_seq_length,
                answer_format=answer_format,
            )
            if fitted is None:
                self.num_dropped += 1
                if len(self.dropped) < 20:
                    self.dropped.append(row.id)
                continue
            encoded, was_cut = fitted
            self.num_cut += was_cut
            assert encoded.num_label_tokens > 0
            yield {
                "input_ids": encoded.input_ids,
                "label_start": encoded.label_start,
                "num_tokens": len(encoded.input_ids),
                "id": row.id,
                "context": row.context,
                "question": row.question,
                "answers": list(row.answers),
                "answer_start": row.answer_start,
            }


def _write_cache(
    folder: Path, rows: _TokenizedRows, fingerprint: str, *, bad: tuple[int, tuple[str, ...]]
) -> ReadCounts:
    """Stream the rows into a staging folder beside `folder`, then rename. The note with the hash is what makes it valid."""
    # ArrowWriter, not Dataset.from_generator: that pickles its arguments to hash them and keeps a cache folder of its own.
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "input_ids": List(Value("int32")),
            "label_start": Value("int32"),
            "num_tokens": Value("int32"),
            "id": Value("string"),
            "context": Value("large_string"),
            "question": Value("string"),
            "answers": List(Value("string")),
            "answer_start": Value("int64"),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        with ArrowWriter(
            features=features,
            path=str(staging / "rows.arrow"),
            fingerprint=fingerprint[:16],
            writer_batch_size=_WRITE_ROWS,
        ) as writer:
            for record in rows:
                writer.write(record)
            writer.finalize()
        counts = ReadCounts(
            num_read=rows.num_read,
            num_cut=rows.num_cut,
            num_dropped=rows.num_dropped,
            num_bad=bad[0],
            bad=bad[1],
            dropped=tuple(rows.dropped),
        )
        note = {"sha256": _hash_file(staging / "rows.arrow"), "counts": asdict(counts)}
        with (staging / "note.json").open("w", encoding="utf-8") as file:
            json.dump(note, file, indent=2)
        for name in ("rows.arrow", "note.json"):
            with (staging / name).open("rb+") as written:
                os.fsync(written.fileno())
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return counts


def _put_in_place(staging: Path, folder: Path) -> None:
    if folder.exists():  # damaged, or it was written by another process a moment ago: the same rows either way
        shutil.rmtree(folder, ignore_errors=True)
    try:
        staging.rename(folder)
    except OSError:
        if _read_cache(folder) is None:  # otherwise another process was faster
            raise


def _read_cache(folder: Path) -> ReadCounts | None:
    """The counts of a complete, undamaged cache folder, otherwise None."""
    try:
        note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        counts = ReadCounts(**note["counts"])
        whole = note["sha256"] == _hash_file(folder / "rows.arrow")
    except (OSError, ValueError, TypeError, KeyError, DataError):
        return None
    return replace(counts, bad=tuple(counts.bad), dropped=tuple(counts.dropped)) if whole else None


def _map(folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"), in_memory=False)


def _hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises DataError when it cannot be read."""
    digest = sha256()
    with open_data_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
