"""Read a SQuAD file (v1.1 or v2.0 JSON as published): every usable question is a row, every other one is counted and named.

In: a path. Out: `SquadFile`, which yields a `QuestionRow` per usable question. The file is streamed, one passage in memory at a time.
Sources: SQuAD arXiv 1606.05250 (v1.1), arXiv 1806.03822 (v2.0: `is_impossible` with no answers). The shape:

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"?}]}]}]}

Surprising: an `answer_start` that points elsewhere is forgiven when the answer's text does occur in the context.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson  # type: ignore[import-untyped]

from qlora_lite.errors import DataError
from qlora_lite.units import format_bytes

MAX_FILE_BYTES = 16 * 2**30  # all of SQuAD v2.0 is 42 MB; above this a mistake is likelier than a data set
MAX_TEXT_CHARS = 1_000_000  # of one context or question; the longest model contexts hold about four million characters
MAX_DEPTH = 64  # SQuAD itself nests 8 deep
NUM_NAMED = 20  # bad rows kept by name


@dataclass(frozen=True)
class QuestionRow:
    """One question about one context. `answers` is empty when the context does not answer it."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_start: int | None = None  # where answers[0] begins in the context, in characters; None when not known


@dataclass(frozen=True)
class BadRow:
    """A question that cannot be used: its id or position in the file, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class SquadFile:
    """A checked SQuAD file. Iterating reads it again and yields its `num_rows` usable rows in file order."""

    path: Path
    num_rows: int
    num_bad: int
    bad: tuple[str, ...]  # the first 20 bad rows, named, with their reason

    def __iter__(self) -> Iterator[QuestionRow]:
        return (row for row in _read_rows(self.path) if isinstance(row, QuestionRow))

    @property
    def rows(self) -> Iterator[QuestionRow]:
        return iter(self)


def read_squad(path: str | os.PathLike[str], *, max_bad_share: float = 0.02) -> SquadFile:
    """Read the whole file once, check every question, and return it ready to be iterated.

    Raises DataError when the file cannot be read as SQuAD JSON, has no usable row, or when more than `max_bad_share` (0 to 1) of its
    questions are bad; the message names the first few.
    """
    path = Path(path)
    num_rows, num_bad = 0, 0
    named: list[str] = []
    for row in _read_rows(path):
        if isinstance(row, QuestionRow):
            num_rows += 1
            continue
        num_bad += 1
        if len(named) < NUM_NAMED:
            named.append(str(row))
    if num_bad + num_rows == 0:
        raise DataError(
            f"{path}: no questions. Expected SQuAD JSON with at least one entry in data[].paragraphs[].qas[]."
        )
    if num_rows == 0 or num_bad > max_bad_share * (num_rows + num_bad):
        raise DataError(_too_many_bad(path, num_rows, num_bad, named, max_bad_share))
    return SquadFile(path=path, num_rows=num_rows, num_bad=num_bad, bad=tuple(named))


def _too_many_bad(path: Path, num_rows: int, num_bad: int, named: list[str], max_bad_share: float) -> str:
    shown = [f"  {name}" for name in named[:5]]
    rest = [f"  ... and {num_bad - 5} more"] if num_bad > 5 else []
    total = num_rows + num_bad
    head = (
        f"{path}: {num_bad} of {total} questions cannot be used ({num_bad / total:.1%}, allowed {max_bad_share:.0%}). "
        f"Mend or remove them:"
    )
    return "\n".join([head, *shown, *rest])


def _read_rows(path: Path) -> Iterator[QuestionRow | BadRow]:
    seen: set[str] = set()
    for where, paragraph in _read_paragraphs(path):
        if not isinstance(paragraph, dict):
            yield BadRow(where, f"expected an object, got {_kind(paragraph)}")
            continue
        questions = paragraph.get("qas")
        if not isinstance(questions, list):
            yield BadRow(f"{where} qas", f"expected a list of questions, got {_kind(questions)}")
            continue
        for position, question in enumerate(questions):
            row = _check_row(paragraph.get("context"), question, f"{where}.qas[{position}]")
            if isinstance(row, QuestionRow) and row.id in seen:
                row = BadRow(f'id "{row.id}"', f"used twice; the second time at {where}.qas[{position}]")
            elif isinstance(row, QuestionRow):
                seen.add(row.id)
            yield row


def _check_row(context: Any, question: Any, where: str) -> QuestionRow | BadRow:
    if not isinstance(question, dict):
        return BadRow(where, f"expected an object, got {_kind(question)}")
    name = f'id "{_short(question["id"])}"' if isinstance(question.get("id"), str) and question["id"] else where
    texts = {"id": question.get("id"), "context": context, "question": question.get("question")}
    for key, text in texts.items():
        if problem := _problem_with_text(text):
            return BadRow(name, f"{key}: {problem}")
    impossible = question.get("is_impossible", False)
    if not isinstance(impossible, bool):
        return BadRow(name, f"is_impossible: expected true or false, got {_kind(impossible)}")
    answers = question.get("answers", [])
    if not isinstance(answers, list):
        return BadRow(name, f"answers: expected a list, got {_kind(answers)}")
    if impossible and answers:
        return BadRow(name, f"is_impossible is true, yet it has {len(answers)} answers")
    if not impossible and not answers:
        return BadRow(name, "no answers, and is_impossible is not true")
    starts = []
    for position, answer in enumerate(answers):
        start, problem = _find_answer(context, answer)
        if problem:
            return BadRow(name, f"answers[{position}]{problem}")
        starts.append(start)
    golds = tuple(answer["text"] for answer in answers)
    return QuestionRow(texts["id"], context, texts["question"], golds, starts[0] if starts else None)


def _find_answer(context: str, answer: Any) -> tuple[int, str]:
    """-> (position in the context, problem or ""). `answer_start` decides when right; otherwise the text's first place does."""
    if not isinstance(answer, dict):
        return -1, f": expected an object with text and answer_start, got {_kind(answer)}"
    text, start = answer.get("text"), answer.get("answer_start")
    if problem := _problem_with_text(text):
        return -1, f".text: {problem}"
    assert isinstance(text, str)
    if isinstance(start, int) and start >= 0 and context.startswith(text, start):
        return int(start), ""
    start = context.find(text)
    return start, "" if start >= 0 else f'.text: "{_short(text)}" does not occur in the context'


def _problem_with_text(text: Any) -> str:
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"expected text, got {_kind(text)}"
    if not text.strip():
        return "empty"
    if len(text) > MAX_TEXT_CHARS:
        return f"{len(text):,} characters, allowed {MAX_TEXT_CHARS:,}"
    # Half of a surrogate pair cannot be encoded, so no tokenizer takes it.
    return "holds half of a surrogate pair" if any("\ud800" <= char <= "\udfff" for char in text) else ""


def _read_paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    """Stream (position, paragraph) from the file; a thing of the wrong type is yielded as it is, for the caller to name."""
    try:
        with open_data_file(path) as file:
            start = file.read(3)
            file.seek(3 if start == b"\xef\xbb\xbf" else 0)  # a byte order mark is no JSON, but editors write it
            yield from _walk(path, ijson.basic_parse(file, use_float=True))
    except (ijson.JSONError, RecursionError, UnicodeError) as error:
        raise _not_json(path, _first_lines(error)) from error


@contextmanager
def open_data_file(path: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes; raises DataError when it is missing, empty, too large or not a regular file."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            what = "a directory" if path.is_dir() else "not a regular file"
            raise DataError(f"{path}: {what}. Expected a SQuAD JSON file.")
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size)
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Expected a SQuAD JSON file.") from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise DataError(f"{str(path)!r}: not a file name, it holds a NUL character.") from error


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes == 0:
        raise DataError(f"{path}: the file is empty. Expected SQuAD JSON.")
    if num_bytes > MAX_FILE_BYTES:
        raise DataError(
            f"{path}: {format_bytes(num_bytes)}, allowed {format_bytes(MAX_FILE_BYTES)}. Split it into smaller files."
        )


def _walk(path: Path, events: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    event, _ = next(events)
    if event != "start_map":
        raise DataError(
            f'{path}: expected an object with a "data" list at the top, got {_KINDS.get(event, event)}.{_HINT}'
        )
    has_data = False
    for key in _keys(path, events):
        event, value = next(events)
        if key != "data":
            _build(path, event, value, events)
            continue
        if event != "start_array":
            raise DataError(f'{path}: "data" must be a list of articles, got {_KINDS.get(event, event)}.{_HINT}')
        has_data = True
        for article, (event, value) in enumerate(_items(events)):
            yield from _walk_article(path, f"data[{article}]", event, value, events)
    for _ in events:  # what follows the document is an error that only reading on finds
        pass
    if not has_data:
        raise DataError(f'{path}: no "data" list at the top.{_HINT}')


def _walk_article(
    path: Path, where: str, event: str, value: Any, events: Iterator[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    if event != "start_map":
        yield where, _build(path, event, value, events)
        return
    has_paragraphs = False
    for key in _keys(path, events):
        event, value = next(events)
        if key != "paragraphs":
            _build(path, event, value, events)
            continue
        has_paragraphs = True
        if event != "start_array":
            yield f"{where}.paragraphs", _build(path, event, value, events)
            continue
        for position, (event, value) in enumerate(_items(events)):
            yield f"{where}.paragraphs[{position}]", _build(path, event, value, events)
    if not has_paragraphs:
        yield f"{where}.paragraphs", None


def _keys(path: Path, events: Iterator[tuple[str, Any]]) -> Iterator[str]:
    """The keys of the object that was just opened; the caller reads each key's value before it asks for the next."""
    for event, value in events:
        if event == "end_map":
            return
        assert event == "map_key", event
        yield value


def _items(events: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The first event of each item of the list that was just opened; the caller reads the rest of it."""
    for event, value in events:
        if event == "end_array":
            return
        yield event, value


def _build(path: Path, event: str, value: Any, events: Iterator[tuple[str, Any]]) -> Any:
    """The value that begins with this event. A loop, not a recursion, and at most MAX_DEPTH levels deep."""
    root: list[Any] = []
    open_containers: list[Any] = [root]
    keys: list[str] = [""]  # per open container, the key that the next value gets
    while True:
        if event == "map_key":
            keys[-1] = value
        elif event in ("end_map", "end_array"):
            open_containers.pop()
            keys.pop()
        else:
            item = {} if event == "start_map" else [] if event == "start_array" else value
            holder = open_containers[-1]
            if isinstance(holder, dict):
                holder[keys[-1]] = item
            else:
                holder.append(item)
            if event in ("start_map", "start_array"):
                open_containers.append(item)
                keys.append("")
                if len(open_containers) > MAX_DEPTH:
                    raise DataError(f"{path}: nested more than {MAX_DEPTH} levels deep; SQuAD JSON nests 8.{_HINT}")
        if len(open_containers) == 1:
            return root[0]
        event, value = next(events)


_HINT = " This version reads SQuAD JSON only (v1.1 or v2.0: data[].paragraphs[].qas[]); convert other formats to it."
_KINDS = {"start_array": "a list", "start_map": "an object", "string": "text", "number": "a number", "null": "null"}
_MAGIC = {
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def _not_json(path: Path, reason: str) -> DataError:
    """The error for a file that is no JSON, with a guess at what it is."""
    with open_data_file(path) as file:
        start = file.read(4096)
    guess = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
    lines = [line.strip() for line in start.splitlines() if line.strip()]
    if not guess and len(lines) > 1 and all(line[:1] + line[-1:] == b"{}" for line in lines[:2]):
        guess = "jsonl (one JSON object a line)"
    elif not guess and b"\0" in start:
        guess = "a binary file"
    looks = f" It looks like {guess}." if guess else ""
    return DataError(f"{path}: not JSON: {reason}.{looks}{_HINT}")


def _first_lines(error: BaseException) -> str:
    """What the parser said and the text around the place, without its drawing of an arrow."""
    said = error.args[0] if error.args else error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "(right here)" not in line]
    message = lines[0].rstrip(".") if lines else "cannot be parsed"
    near = f", near {_short(lines[1])!r}" if len(lines) > 1 else ""
    return message + near


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
