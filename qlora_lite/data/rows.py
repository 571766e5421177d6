"""What a data file holds, row by row: a question about a passage, a conversation, or a document; or a row that cannot be used.

Readers make these, `fit.py` turns them into token ids. Only a `QuestionRow` may lose text when it is too long (some of its passage).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from typing import Any

from qlora_lite.limits import TEXT_CHARS

# {"role": ..., "content": ..., and what else a chat template reads, such as tool_calls}
Message = dict[str, Any]


@dataclass(frozen=True)
class QuestionRow:
    """One question about one context. `answers` is empty when the context does not answer it."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_start: int | None = None  # where answers[0] begins in the context, in characters; None when not known


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, the last one a trained one. Every assistant message is trained that has one before it and not weight 0.

    `first_trained` is the index of the first message that may be trained: answers before it belong to the prompt.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()  # JSON schemas of functions, given to the template
    first_trained: int = 1

    @property
    def trained_turns(self) -> list[int]:
        """Indices of the messages that are trained, in order."""
        start = max(1, self.first_trained)  # nothing was said before message 0, so it answers nothing
        messages = enumerate(self.messages[start:], start)
        return [i for i, message in messages if message["role"] == "assistant" and message.get("weight") != 0]


@dataclass(frozen=True)
class Document:
    """Plain text; every token is trained."""

    id: str
    text: str


Row = QuestionRow | Conversation | Document


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its id or position in the file, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def row_name(given: Any, place: str) -> tuple[str, bool]:
    """-> (what a row with this `id` is called, whether its id says so); a missing, empty or unusable id leaves its place in the file.

    7, 7.0 and "7" are the same name: which of them a library writes depends on the other rows of the column.
    """
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    is_usable = isinstance(given, int | str) and not isinstance(given, bool)
    name = str(given) if is_usable or (isinstance(given, float) and isfinite(given)) else ""
    return (place, False) if problem_with_text(name) else (name, True)


def content_hash(row: Row, without_ends: Callable[[str], str]) -> int:
    """A signed 64-bit number for all that is learned from a row; its id does not count.

    `without_ends` takes off what does not count at the ends of texts: white space, and a template's stop tokens.
    """
    if isinstance(row, QuestionRow):
        content: list[Any] = [row.context, row.question, row.answers[0] if row.answers else None]
    elif isinstance(row, Document):
        content = [row.text]
    else:
        content = [*row.messages, *row.tools, row.trained_turns]
    text = json.dumps(_without_ends(content, without_ends), sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _without_ends(value: Any, take_off: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return take_off(value)
    if isinstance(value, dict):
        return {key: _without_ends(item, take_off) for key, item in value.items()}
    return [_without_ends(item, take_off) for item in value] if isinstance(value, list | tuple) else value


def problem_with_text(text: Any) -> str:
    """Why `text` cannot be a text of a row, or ""."""
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"expected text, got {kind(text)}"
    if not text.strip():
        return "empty"
    if len(text) > TEXT_CHARS:
        return f"{len(text):,} characters, allowed {TEXT_CHARS:,}"
    # Half of a surrogate pair cannot be encoded, so no tokenizer takes it.
    return "holds half of a surrogate pair" if any("\ud800" <= char <= "\udfff" for char in text) else ""


def kind(value: Any) -> str:
    """What a value is, in words for people."""
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def short(text: str, limit: int = 60) -> str:
    """`text`, cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
