"""SQuAD questions (v1.1 or v2.0), nested as published or one per row: each becomes a `QuestionRow`, or a `BadRow` with the reason.

In: a path of nested JSON, or the columns of one row. The file is streamed, one passage in memory at a time.
Sources: SQuAD arXiv 1606.05250 (v1.1), arXiv 1806.03822 (v2.0: `is_impossible` with no answers). The nested shape:

    {"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"?}]}]}]}

Surprising: a wrong `answer_start` is accepted if the answer's text occurs in the context.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lite.data import json_stream
from qlora_lite.data.rows import BadRow, QuestionRow, kind, problem_with_text, row_name, short
from qlora_lite.errors import DataError
from qlora_lite.files.json_text import RepeatedKey, parse_json

_HINT = " Expected SQuAD JSON (v1.1 or v2.0: data[].paragraphs[].qas[])."


def read_questions(path: Path) -> Iterator[QuestionRow | BadRow]:
    """Yield every question of a nested file, in file order. Raises DataError when the file has another structure."""
    for where, paragraph in _walk(path, json_stream.read_events(path)):
        if isinstance(paragraph, RepeatedKey):
            yield BadRow(where, str(paragraph))
            continue
        if not isinstance(paragraph, dict):
            yield BadRow(where, f"expected an object, got {kind(paragraph)}")
            continue
        questions = paragraph.get("qas")
        if not isinstance(questions, list):
            yield BadRow(f"{where} qas", f"expected a list of questions, got {kind(questions)}")
            continue
        for position, question in enumerate(questions):
            yield check_question(paragraph.get("context"), question, f"{where}.qas[{position}]")


def check_question(context: Any, question: Any, where: str) -> QuestionRow | BadRow:
    """A question object of the nested shape and its passage -> the row. `where` names it if it has no usable id."""
    if not isinstance(question, dict):
        return BadRow(where, f"expected an object, got {kind(question)}")
    row_id, has_id = row_name(question.get("id"), where)
    name = f'id "{short(row_id)}"' if has_id and row_id != where else where
    texts = {"context": context, "question": question.get("question")}
    for key, text in texts.items():
        if problem := problem_with_text(text):
            return BadRow(name, f"{key}: {problem}")
    impossible = question.get("is_impossible", False)
    if not isinstance(impossible, bool):
        return BadRow(name, f"is_impossible: expected true or false, got {kind(impossible)}")
    answers = question.get("answers", [])
    if not isinstance(answers, list):
        return BadRow(name, f"answers: expected a list, got {kind(answers)}")
    if impossible and answers:
        return BadRow(name, f"is_impossible is true, but there are {len(answers)} answers")
    if not impossible and not answers:
        return BadRow(name, "no answers, but is_impossible is not true")
    starts = []
    for position, answer in enumerate(answers):
        start, problem = _find_answer(context, answer)
        if problem:
            return BadRow(name, f"answers[{position}]{problem}")
        starts.append(start)
    golds = tuple(answer["text"] for answer in answers)
    return QuestionRow(row_id, context, texts["question"], golds, starts[0] if starts else None)


def check_columns(values: dict[str, Any], where: str) -> QuestionRow | BadRow:
    """The columns `context`, `question`, `answers` (or `answer`) and optionally `is_impossible` -> the row.

    `answers` has the form of `datasets` ({"text": [...], "answer_start": [...]}, empty lists for no answer), of the nested file, or plain
    text, one or a list. Without a usable `id`, the position in the file is the id. In csv cells, a list is JSON, `is_impossible` is true
    or false, and an empty `answers` means no answers.
    """
    impossible = _as_bool(values.get("is_impossible"))
    given = _from_cell(values["answers"]) if "answers" in values else values.get("answer")
    answers = [] if impossible is True and given in (None, "") else _as_answers(given)
    if impossible is None:
        impossible = bool(answers == [] and isinstance(given, dict | list))
    question = {
        "id": values.get("id"),
        "question": values.get("question"),
        "answers": answers,
        "is_impossible": impossible,
    }
    return check_question(values.get("context"), question, where)


def _as_bool(given: Any) -> Any:
    """A csv cell of `is_impossible` -> true, false or None; other values unchanged, for `check_question` to report."""
    if not isinstance(given, str):
        return given
    return {"true": True, "1": True, "false": False, "0": False, "": None}.get(given.strip().lower(), given)


def _from_cell(given: Any) -> Any:
    """A csv cell of `answers` -> the list or object of its JSON, or the answer itself; [] for an empty cell."""
    if not isinstance(given, str):
        return given
    if not given.strip():
        return []
    if not given.lstrip().startswith(("[", "{")):
        return given
    try:
        parsed = parse_json(given)
    except ValueError:
        return given  # an answer may begin with a bracket
    texts = parsed.get("text") if isinstance(parsed, dict) else parsed
    is_list = isinstance(texts, list) and all(isinstance(text, str | dict) for text in texts)
    return parsed if is_list else given


def _as_answers(given: Any) -> Any:
    """Any form of answers -> a list of {"text", "answer_start"}; other values unchanged, for `check_question` to report."""
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        texts = given["text"]
        starts = given.get("answer_start")
        starts = starts if isinstance(starts, list) and len(starts) == len(texts) else [None] * len(texts)
        return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(given, str):
        return [{"text": given}]
    if isinstance(given, list):
        return [{"text": answer} if isinstance(answer, str) else answer for answer in given]
    return given


def _find_answer(context: str, answer: Any) -> tuple[int, str]:
    """-> (position in the context, problem or ""). Uses `answer_start` if it is right, else the first occurrence of the text."""
    if not isinstance(answer, dict):
        return -1, f": expected an object with text and answer_start, got {kind(answer)}"
    text, start = answer.get("text"), answer.get("answer_start")
    if problem := problem_with_text(text):
        return -1, f".text: {problem}"
    assert isinstance(text, str)
    if isinstance(start, int) and start >= 0 and context.startswith(text, start):
        return int(start), ""
    start = context.find(text)
    return start, "" if start >= 0 else f'.text: "{short(text)}" does not occur in the context'


def _walk(path: Path, events: json_stream.Events) -> Iterator[tuple[str, Any]]:
    """Stream (position, paragraph); yields values of a wrong type unchanged, for the caller to report."""
    event, _ = next(events)
    if event != "start_map":
        raise DataError(
            f'{path}: expected an object with a "data" list at the top, got {json_stream.KINDS.get(event, event)}.{_HINT}'
        )
    has_data = False
    for key in json_stream.keys(events):
        event, value = next(events)
        if key != "data":
            json_stream.build(path, event, value, events)
            continue
        if event != "start_array":
            raise DataError(
                f'{path}: "data" must be a list of articles, got {json_stream.KINDS.get(event, event)}.{_HINT}'
            )
        has_data = True
        for article, (event, value) in enumerate(json_stream.items(events)):
            yield from _walk_article(path, f"data[{article}]", event, value, events)
    for _ in events:  # read on: text after the document is an error
        pass
    if not has_data:
        raise DataError(f'{path}: no "data" list at the top.{_HINT}')


def _walk_article(
    path: Path, where: str, event: str, value: Any, events: json_stream.Events
) -> Iterator[tuple[str, Any]]:
    if event != "start_map":
        yield where, json_stream.build(path, event, value, events)
        return
    has_paragraphs = False
    for key in json_stream.keys(events):
        event, value = next(events)
        if key != "paragraphs":
            json_stream.build(path, event, value, events)
            continue
        has_paragraphs = True
        if event != "start_array":
            yield f"{where}.paragraphs", json_stream.build(path, event, value, events)
            continue
        for position, (event, value) in enumerate(json_stream.items(events)):
            try:
                paragraph = json_stream.build(path, event, value, events, unique_keys=True)
            except RepeatedKey as error:
                paragraph = error
            yield f"{where}.paragraphs[{position}]", paragraph
    if not has_paragraphs:
        yield f"{where}.paragraphs", None
