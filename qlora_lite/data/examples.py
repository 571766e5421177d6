"""Tokenized examples on disk: written once per (files, tokenizer, settings), memory-mapped afterwards.

In: data files and a tokenizer. Out: `Examples`, whose rows lie in an Arrow file at `cache_dir/<fingerprint>/`. They are streamed there
through a staging folder and one rename, so data may be larger than memory and a killed run leaves nothing half-written to be found.

Surprising:
- A row may make several examples (pieces of a text, turns of a conversation), or none: one that is too long and may not be shortened is
  dropped and counted (fit.py). No example is without labels.
- A question whose context was shortened is still *asked* about all of it: `prompt_ids(i)`.
- The cache is checked by SHA-256 and rewritten when it is damaged.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lite.data.files import hash_file
from qlora_lite.data.fit import Example, RowFitter, TemplateNotes
from qlora_lite.data.read import Source, as_pairs, file_identity, read_mix
from qlora_lite.data.rows import Document, Row, content_hash
from qlora_lite.data.template import UNKNOWN_BASE, ChatTemplate, Encoded, Tokenizer, Vocabulary, tokenizer_identity
from qlora_lite.errors import DataError
from qlora_lite.files.made_once import making
from qlora_lite.files.staging import new_staging, remove_left_over, unlock

CODE_VERSION = 6  # raise it when the same file and tokenizer should give other rows
_WRITE_ROWS = 256  # rows held in memory while writing
_NUM_KEPT, _NUM_SAID = 20, 3  # names of rows that are kept, and said


@dataclass(frozen=True)
class ReadCounts:
    """What happened to the rows of the files on their way to examples."""

    num_read: int  # usable rows that were taken from the files
    num_left_out: int  # usable rows beyond the number that was asked for
    num_cut: int  # of these, kept with a shortened context, or cut in pieces (text)
    num_dropped: int  # of these, left out: longer than max_seq_length
    num_bad: int  # unusable rows in the whole files, and rows taken that the template cannot render
    bad: tuple[str, ...]  # the first of them, named, with reasons
    dropped: tuple[str, ...]  # ids of the first dropped rows
    cut: tuple[str, ...]  # ids of the first rows that were cut
    is_text: bool  # every row is plain text
    notes: tuple[
        str, ...
    ]  # which columns are not used, what was done to rows because of the chat template; a sentence each


class Examples:
    """Tokenized rows by index, memory-mapped. `lengths`, `contents` and `num_label_tokens` are numpy int64 arrays [num examples]."""

    def __init__(self, dataset: Any, *, counts: ReadCounts, fingerprint: str, max_seq_length: int | None) -> None:
        self.dataset = dataset  # datasets.Dataset, with the columns of `_write_cache`
        self.counts = counts
        self.fingerprint = fingerprint
        self.max_seq_length = max_seq_length
        column = dataset.data.column  # whole columns without building Python objects
        self.lengths = column("num_tokens").to_numpy().astype(np.int64)
        self.contents = column("content").to_numpy().astype(np.int64)
        self.row_numbers = column("row").to_numpy().astype(np.int64)
        self.num_label_tokens = column("num_label_tokens").to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_text(self) -> bool:
        """Whether every row is plain text: nothing to ask and compare."""
        return self.counts.is_text

    @property
    def num_dropped(self) -> int:
        """Rows left out because they exceed `max_seq_length` and may not be shortened enough."""
        return self.counts.num_dropped

    @property
    def num_cut(self) -> int:
        """Rows kept with a shortened context, or cut in pieces."""
        return self.counts.num_cut

    def account(self, rows: str, *, limit: str, length_key: str = "data.max_seq_length") -> list[str]:
        """What became of rows that are not used, or not as they are, and how their files were read, a sentence each; [] when all is plain.

        `rows` is what to call them, `limit` and `length_key` the keys of the recipe that limit their number and their length.
        """
        counts = self.counts
        said: list[str] = []
        if counts.num_left_out:
            total = counts.num_read + counts.num_left_out
            said.append(f"the first {counts.num_read:,} of {total:,} rows; {limit}: null takes all")
        if counts.num_bad:
            said.append(f"{counts.num_bad:,} bad rows left out: {_first_few(counts.bad, counts.num_bad)}")
        if counts.num_dropped:
            said.append(
                f"{counts.num_dropped:,} of {counts.num_read:,} rows left out, longer than {length_key} "
                f"({self.max_seq_length}): {_first_few(counts.dropped, counts.num_dropped)}"
            )
        if counts.num_cut:
            how = "cut in pieces of" if counts.is_text else "cut (a shorter context, or a text in pieces) to"
            said.append(
                f"{counts.num_cut:,} of {counts.num_read:,} rows {how} {length_key} ({self.max_seq_length}): "
                f"{_first_few(counts.cut, counts.num_cut)}"
            )
        return [f"{rows}: {sentence}" for sentence in (*said, *counts.notes)]

    def encoded(self, index: int) -> Encoded:
        """Token ids of example `index` (possibly with a shortened context)."""
        edges = self._column("span_edges", index)
        return Encoded(self._column("input_ids", index), tuple(zip(edges[::2], edges[1::2], strict=True)))

    def prompt_ids(self, index: int) -> list[int]:
        """Token ids to generate the last answer of example `index` from; a shortened question has its whole context here."""
        return self.row(index).prompt_ids

    def row(self, index: int) -> Example:
        """What is trained and asked in example `index`, and all gold answers."""
        answers, whole_prompt_ids = (self._column(name, index) for name in ("answers", "whole_prompt_ids"))
        return Example(
            self._column("id", index),
            self.encoded(index),
            self._column("question", index),
            None if answers is None else tuple(answers),
            None if whole_prompt_ids is None else tuple(whole_prompt_ids),
            self._column("is_squad", index),
        )

    def _column(self, name: str, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is outside 0 to {len(self) - 1}")
        return self.dataset.data.column(name)[int(index)].as_py()


def load_examples(
    source: Source,
    tokenizer: Tokenizer,
    *,
    num_rows: int | None,
    no_answer_text: str,
    max_seq_length: int | None,
    cache_dir: str | os.PathLike[str],
    format: str = "auto",
    max_bad_share: float = 0.02,
    may_cut: bool = True,
    vocabulary: Vocabulary = UNKNOWN_BASE,
) -> Examples:
    """Tokenize the first `num_rows` usable rows of a file or of several with weights (None: all), or map what an earlier call wrote.

    `max_seq_length` is in tokens (None: no limit). Without `may_cut` a question that is longer is left out, and where every row is too
    long the result is empty: its caller says what to do. Raises DataError when a file is unusable (see `read_mix`), when the template
    cannot render more than `max_bad_share` of the rows, when every row is too long, or when the cache cannot be written; ModelError
    when the tokenizer's template is unusable, or a token of the rows is beyond the embedding of `vocabulary`.
    """
    for name, number in (("num_rows", num_rows), ("max_seq_length", max_seq_length)):
        if number is not None and number < 1:
            raise DataError(f"{name}: expected a whole number above 0, got {number}")
    if not no_answer_text.strip():
        raise DataError(
            "no_answer_text: empty, so an unanswerable row would have no answer to train on. Give it a word."
        )
    pairs, cache_dir = as_pairs(source), Path(cache_dir)
    settings = {
        "code_version": CODE_VERSION,
        "tokenizer": tokenizer_identity(tokenizer),
        "vocabulary": asdict(vocabulary),
        "num_rows": num_rows,
        "no_answer_text": no_answer_text,
        "max_seq_length": max_seq_length,
        "format": format,
        "max_bad_share": max_bad_share,
        "may_cut": may_cut,
        "names": [path.name for path, _ in pairs] if len(pairs) > 1 else [],  # they are part of the rows' ids then
        "data": [(file_identity(path), weight) for path, weight in pairs],
    }
    fingerprint = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_dir / fingerprint
    counts = _read_cache(folder)
    if counts is None:

        def tokenize() -> ReadCounts:
            mix = read_mix(source, format=format, num_rows=num_rows, max_bad_share=max_bad_share)
            fitter = RowFitter(
                mix,
                ChatTemplate(tokenizer, vocabulary),
                no_answer_text=no_answer_text,
                max_seq_length=max_seq_length,
                max_bad_share=max_bad_share,
                may_cut=may_cut,
            )
            return _write_cache(folder, _Records(fitter), fingerprint)

        try:
            with making(folder):
                counts = _read_cache(folder) or tokenize()
        except OSError as error:
            raise DataError(
                f"{cache_dir}: the tokenized rows cannot be written: {error.strerror or error}. "
                f"Free some room, or set QLORA_LITE_HOME to another folder."
            ) from error
    if may_cut and counts.num_read == counts.num_dropped:
        raise DataError(
            f"{', '.join(str(path) for path, _ in pairs)}: every one of the {counts.num_read} rows would lose its answer: "
            f"shortened as far as it may be, it still exceeds max_seq_length={max_seq_length}. Raise data.max_seq_length."
        )
    return Examples(_map(folder), counts=counts, fingerprint=fingerprint, max_seq_length=max_seq_length)


class _Records:
    """Iterates once over the records to write, and counts what happens to the rows on the way."""

    def __init__(self, fitter: RowFitter) -> None:
        self.fitter = fitter
        self.num_read = self.num_cut = self.num_dropped = 0
        self.notes = TemplateNotes()
        self.dropped: list[str] = []
        self.cut: list[str] = []
        self.is_text = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        last: Row | None = None
        for row in self.fitter.mix:
            number += row is not last  # a weight takes the same row several times, one after the other
            last = row
            fitted = self.fitter.fit(row)
            if fitted is None:
                continue
            examples, was_cut = fitted
            self.num_read += 1
            self.is_text = self.is_text and isinstance(row, Document)
            if not examples:
                self.num_dropped += 1
                self.dropped += [row.id] if len(self.dropped) < _NUM_KEPT else []
                continue
            self.num_cut += was_cut
            self.cut += [row.id] if was_cut and len(self.cut) < _NUM_KEPT else []
            self.notes.count(self.fitter.template, row, examples)
            content = content_hash(row, lambda text: self.fitter.template.answer_text(text).strip())
            yield from ({**_record(example), "content": content, "row": number} for example in examples)
        self.fitter.refuse_too_many()

    @property
    def counts(self) -> ReadCounts:
        return ReadCounts(
            num_read=self.num_read,
            num_left_out=self.fitter.mix.num_left_out,
            num_cut=self.num_cut,
            num_dropped=self.num_dropped,
            num_bad=self.fitter.num_bad,
            bad=self.fitter.bad,
            dropped=tuple(self.dropped),
            cut=tuple(self.cut),
            is_text=self.is_text,
            notes=(*self.fitter.mix.notes, *self.notes.sentences),
        )


def _first_few(named: Sequence[str], num_rows: int) -> str:
    more = num_rows - min(len(named), _NUM_SAID)
    return "; ".join(named[:_NUM_SAID]) + (f"; and {more:,} more" if more else "")


def _record(example: Example) -> dict[str, Any]:
    encoded = example.encoded
    return {
        "input_ids": encoded.input_ids,
        "span_edges": [edge for span in encoded.spans for edge in span],
        "num_tokens": len(encoded.input_ids),
        "num_label_tokens": encoded.num_label_tokens,
        "id": example.id,
        "question": example.question,
        "answers": None if example.answers is None else list(example.answers),
        "whole_prompt_ids": None if example.whole_prompt_ids is None else list(example.whole_prompt_ids),
        "is_squad": example.is_squad,
    }


def _write_cache(folder: Path, records: _Records, fingerprint: str) -> ReadCounts:
    """Stream the rows into a staging folder beside `folder`, then rename. The note with the hash is what makes it valid."""
    # ArrowWriter, not Dataset.from_generator: that pickles its arguments to hash them and keeps a cache folder of its own.
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "input_ids": List(Value("int32")),
            "span_edges": List(Value("int32")),  # start, end, start, end ...
            "num_tokens": Value("int32"),
            "num_label_tokens": Value("int32"),
            "id": Value("string"),
            "question": Value("large_string"),
            "answers": List(Value("large_string")),  # null: none to compare (text, a call)
            "whole_prompt_ids": List(Value("int32")),  # null: the ids before the last span
            "is_squad": Value("bool"),
            "row": Value("int64"),  # its number
            "content": Value("int64"),  # of the row that the example comes from (repeats.py)
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(folder)
    staging, lock = new_staging(folder)
    try:
        with ArrowWriter(
            features=features,
            path=str(staging / "rows.arrow"),
            fingerprint=fingerprint[:16],
            writer_batch_size=_WRITE_ROWS,
        ) as writer:
            for record in records:
                writer.write(record)
            writer.finalize()
        counts = records.counts
        note = {"sha256": hash_file(staging / "rows.arrow"), "counts": asdict(counts)}
        with (staging / "note.json").open("w", encoding="utf-8") as file:
            json.dump(note, file, indent=2)
        for name in ("rows.arrow", "note.json"):
            with (staging / name).open("rb+") as written:
                os.fsync(written.fileno())
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        unlock(lock)
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
        whole = note["sha256"] == hash_file(folder / "rows.arrow")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, DataError):
        return None
    return _with_tuples(counts) if whole else None


def _with_tuples(counts: ReadCounts) -> ReadCounts:
    """JSON has none."""
    bad, dropped, cut, notes = (tuple(lines) for lines in (counts.bad, counts.dropped, counts.cut, counts.notes))
    return replace(counts, bad=bad, dropped=dropped, cut=cut, notes=notes)


def _map(folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"), in_memory=False)
