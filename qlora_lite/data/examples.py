"""Tokenized examples on disk: written once per (files, tokenizer, settings), memory-mapped afterwards.

In: data files and a tokenizer. Out: `Examples`, stored in an Arrow file at `cache_dir/<fingerprint>/`. They are streamed there
through a staging folder and one rename: data may be larger than memory, and a killed run leaves no partial cache.

Surprising:
- A row may make several examples (pieces of a text, turns of a conversation), or none: a row that is too long and cannot be shortened
  is dropped and counted (fit.py). Every example has labels.
- A question with a shortened context is still *asked* with the full context: `prompt_ids(i)`.
- The cache is checked by SHA-256 and rewritten if it is damaged.
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

CODE_VERSION = 6  # increase it when the same file and tokenizer should give other examples
_WRITE_EXAMPLES = 256  # examples held in memory while writing
_NUM_KEPT, _NUM_SHOWN = 20, 3  # row names stored, and shown


@dataclass(frozen=True)
class ReadCounts:
    """Counts of the rows of the files by outcome."""

    num_read: int  # usable rows taken from the files
    num_left_out: int  # usable rows beyond the requested number
    num_cut: int  # of num_read, kept with a shortened context, or cut in pieces (text)
    num_dropped: int  # of num_read, left out: longer than max_seq_length
    num_bad: int  # unusable rows in the whole files, and rows taken that the template cannot render
    bad: tuple[str, ...]  # the first of them, named, with reasons
    dropped: tuple[str, ...]  # ids of the first dropped rows
    cut: tuple[str, ...]  # ids of the first rows that were cut
    is_text: bool  # every row is plain text
    notes: tuple[str, ...]  # unused columns, changes to rows by the chat template; one sentence each


class Examples:
    """Examples by index, memory-mapped. `lengths`, `contents` and `num_label_tokens` are numpy int64 arrays [num examples]."""

    def __init__(self, dataset: Any, *, counts: ReadCounts, fingerprint: str, max_seq_length: int | None) -> None:
        self.dataset = dataset  # datasets.Dataset, with the columns of `_write_cache`
        self.counts = counts
        self.fingerprint = fingerprint
        self.max_seq_length = max_seq_length
        column = dataset.data.column  # complete columns without Python objects
        self.lengths = column("num_tokens").to_numpy().astype(np.int64)
        self.contents = column("content").to_numpy().astype(np.int64)
        self.row_numbers = column("row").to_numpy().astype(np.int64)
        self.num_label_tokens = column("num_label_tokens").to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_text(self) -> bool:
        """Whether every row is plain text, without questions or answers to compare."""
        return self.counts.is_text

    @property
    def num_dropped(self) -> int:
        """Rows left out because they exceed `max_seq_length` and cannot be shortened enough."""
        return self.counts.num_dropped

    @property
    def num_cut(self) -> int:
        """Rows kept with a shortened context, or cut in pieces."""
        return self.counts.num_cut

    def account(self, rows: str, *, limit: str, length_key: str = "data.max_seq_length") -> list[str]:
        """Report rows left out or changed, and how their files were read, one sentence each; [] if there is nothing to report.

        `rows` is their name in the sentences; `limit` and `length_key` are the recipe keys that limit their number and length.
        """
        counts = self.counts
        sentences: list[str] = []
        if counts.num_left_out:
            total = counts.num_read + counts.num_left_out
            sentences.append(f"the first {counts.num_read:,} of {total:,} rows; {limit}: null takes all")
        if counts.num_bad:
            sentences.append(f"{counts.num_bad:,} bad rows left out: {_first_few(counts.bad, counts.num_bad)}")
        if counts.num_dropped:
            sentences.append(
                f"{counts.num_dropped:,} of {counts.num_read:,} rows left out, longer than {length_key} "
                f"({self.max_seq_length}): {_first_few(counts.dropped, counts.num_dropped)}"
            )
        if counts.num_cut:
            how = "cut in pieces of" if counts.is_text else "cut (shorter context, or text in pieces) to"
            sentences.append(
                f"{counts.num_cut:,} of {counts.num_read:,} rows {how} {length_key} ({self.max_seq_length}): "
                f"{_first_few(counts.cut, counts.num_cut)}"
            )
        return [f"{rows}: {sentence}" for sentence in (*sentences, *counts.notes)]

    def encoded(self, index: int) -> Encoded:
        """Return the token ids of example `index` (possibly with a shortened context)."""
        edges = self._column("span_edges", index)
        return Encoded(self._column("input_ids", index), tuple(zip(edges[::2], edges[1::2], strict=True)))

    def prompt_ids(self, index: int) -> list[int]:
        """Return the token ids from which to generate the last answer of example `index`, always with the full context."""
        return self.row(index).prompt_ids

    def row(self, index: int) -> Example:
        """Return example `index` with its question and all gold answers."""
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


@dataclass(frozen=True)
class Reading:
    """How data files become examples, apart from their length: the keys of a recipe's data section that decide it."""

    format: str = "auto"
    num_rows: int | None = None  # the first usable ones; None: all
    no_answer_text: str = "unanswerable"  # what is trained for a question without an answer
    vocabulary: Vocabulary = UNKNOWN_BASE
    max_bad_share: float = 0.02


def load_examples(
    source: Source,
    tokenizer: Tokenizer,
    reading: Reading = Reading(),
    *,
    max_seq_length: int | None,
    cache_dir: str | os.PathLike[str],
    may_cut: bool = True,
) -> Examples:
    """Tokenize the first `num_rows` usable rows (None: all) of one or several weighted files, or map the cache of an earlier call.

    `max_seq_length` is in tokens (None: no limit). Without `may_cut`, longer questions are left out, and the result may be empty: the
    caller reports that. Raises DataError when a file is unusable (see `read_mix`), when the template cannot render more than
    `max_bad_share` of the rows, when every row is too long, or when the cache cannot be written; ModelError when the tokenizer's
    template is unusable, or a token of the rows is beyond the embedding of `vocabulary`.
    """
    for name, number in (("num_rows", reading.num_rows), ("max_seq_length", max_seq_length)):
        if number is not None and number < 1:
            raise DataError(f"{name}: expected a whole number above 0, got {number}")
    if not reading.no_answer_text.strip():
        raise DataError("no_answer_text: empty; an unanswerable row needs an answer to train on. Give it a word.")
    pairs, cache_dir = as_pairs(source), Path(cache_dir)
    settings = _settings(pairs, tokenizer, reading, max_seq_length, may_cut)
    fingerprint = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_dir / fingerprint
    counts = _read_cache(folder)
    if counts is None:

        def tokenize() -> ReadCounts:
            mix = read_mix(
                source, format=reading.format, num_rows=reading.num_rows, max_bad_share=reading.max_bad_share
            )
            fitter = RowFitter(
                mix,
                ChatTemplate(tokenizer, reading.vocabulary),
                no_answer_text=reading.no_answer_text,
                max_seq_length=max_seq_length,
                max_bad_share=reading.max_bad_share,
                may_cut=may_cut,
            )
            return _write_cache(folder, _Records(fitter), fingerprint)

        try:
            with making(folder):
                counts = _read_cache(folder) or tokenize()
        except OSError as error:
            raise DataError(
                f"{cache_dir}: cannot write the tokenized examples: {error.strerror or error}. "
                f"Free some space, or set QLORA_LITE_HOME to another folder."
            ) from error
    if may_cut and counts.num_read == counts.num_dropped:
        raise DataError(
            f"{', '.join(str(path) for path, _ in pairs)}: all {counts.num_read} rows would lose their answer: even with the "
            f"shortest context they exceed max_seq_length={max_seq_length}. Increase data.max_seq_length."
        )
    return Examples(_map(folder), counts=counts, fingerprint=fingerprint, max_seq_length=max_seq_length)


def _settings(
    pairs: Sequence[tuple[Path, float]],
    tokenizer: Tokenizer,
    reading: Reading,
    max_seq_length: int | None,
    may_cut: bool,
) -> dict[str, Any]:
    """Everything that the tokenized examples depend on."""
    return {
        "code_version": CODE_VERSION,
        "tokenizer": tokenizer_identity(tokenizer),
        "vocabulary": asdict(reading.vocabulary),
        "num_rows": reading.num_rows,
        "no_answer_text": reading.no_answer_text,
        "max_seq_length": max_seq_length,
        "format": reading.format,
        "max_bad_share": reading.max_bad_share,
        "may_cut": may_cut,
        "names": [path.name for path, _ in pairs] if len(pairs) > 1 else [],  # then they are part of the row ids
        "data": [(file_identity(path), weight) for path, weight in pairs],
    }


class _Records:
    """Iterates once over the records to write, and counts the rows by outcome."""

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
            number += row is not last  # a weight repeats the same row several times in sequence
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
    more = num_rows - min(len(named), _NUM_SHOWN)
    return "; ".join(named[:_NUM_SHOWN]) + (f"; and {more:,} more" if more else "")


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
    """Stream the examples into a staging folder beside `folder`, then rename it. The hash in note.json makes the folder valid."""
    # ArrowWriter, not Dataset.from_generator, which pickles its arguments to hash them and uses a cache folder of its own.
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
            "answers": List(Value("large_string")),  # null: no answers to compare (text, a call)
            "whole_prompt_ids": List(Value("int32")),  # null: the ids before the last span
            "is_squad": Value("bool"),
            "row": Value("int64"),  # number of the row that made the example
            "content": Value("int64"),  # content hash of that row (repeats.py)
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
            writer_batch_size=_WRITE_EXAMPLES,
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
    if folder.exists():  # damaged, or just written by another process: the same examples in both cases
        shutil.rmtree(folder, ignore_errors=True)
    try:
        staging.rename(folder)
    except OSError:
        if _read_cache(folder) is None:  # else another process was faster
            raise


def _read_cache(folder: Path) -> ReadCounts | None:
    """Return the counts of a complete, undamaged cache folder, else None."""
    try:
        note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        counts = ReadCounts(**note["counts"])
        whole = note["sha256"] == hash_file(folder / "rows.arrow")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, DataError):
        return None
    return _with_tuples(counts) if whole else None


def _with_tuples(counts: ReadCounts) -> ReadCounts:
    """Convert the lists from JSON to tuples."""
    bad, dropped, cut, notes = (tuple(lines) for lines in (counts.bad, counts.dropped, counts.cut, counts.notes))
    return replace(counts, bad=bad, dropped=dropped, cut=cut, notes=notes)


def _map(folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"), in_memory=False)
