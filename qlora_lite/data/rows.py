"""The rows of a data file: a question about a passage, a conversation, a document, or a bad row.

Readers make rows, `fit.py` turns them into token ids. Only a `QuestionRow` may lose text when it is too long (part of its passage).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from typing import Any

from qlora_lite.limits import TEXT_CHARS

# {"role": ..., "content": ..., and other keys that chat templates read, such as tool_calls}
Message = dict[str, Any]


@dataclass(frozen=True)
class QuestionRow:
    """One question about one context. `answers` is empty when the context does not answer it."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    answer_start: int | None = None  # position of answers[0] in the context, in characters; None if unknown


@dataclass(frozen=True)
class Conversation:
    """Messages in order, ending in a trained one. Every assistant message after another message is trained, except with weight 0.

    `first_trained` is the index of the first message that may be trained: answers before it belong to the prompt.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()  # JSON schemas of functions, passed to the template
    first_trained: int = 1

    @property
    def trained_turns(self) -> list[int]:
        """Indices of the trained messages, in order."""
        start = max(1, self.first_trained)  # message 0 has no prompt
        messages = enumerate(self.messages[start:], start)
        return [i for i, message in messages if message["role"] == "assistant" and message.get("weight") != 0]


@dataclass(frozen=True)
class Document:
    """Plain text; every token is trained."""

    id: str
    text: str


Row = QuestionRow | Conversation | Document
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class BadRow:
    """An unusable row: its id or position in the file, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def row_name(given: Any, place: str) -> tuple[str, bool]:
    """-> (the name of a row with this `id`, whether it is the id); `place` is the name if the id is missing, empty or unusable.

    7, 7.0 and "7" are the same name: the form that a library writes depends on the other rows of the column.
    """
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    is_usable = isinstance(given, int | str) and not isinstance(given, bool)
    name = str(given) if is_usable or (isinstance(given, float) and isfinite(given)) else ""
    return (place, False) if problem_with_text(name) else (name, True)


def content_hash(row: Row, without_ends: Callable[[str], str]) -> int:
    """Return a signed 64-bit hash of everything learned from a row; ignores its id.

    `without_ends` removes the irrelevant ends of texts: white space, and a template's stop tokens.
    """
    if isinstance(row, QuestionRow):
        content: list[Any] = [row.context, row.question, row.answers[0] if row.answers else None]
    elif isinstance(row, Document):
        content = [row.text]
    else:
        content = [*row.messages, *row.tools, row.trained_turns]
    text = json.dumps(_without_ends(content, without_ends), sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _without_ends(value: Any, strip: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return strip(value)
    if isinstance(value, dict):
        return {key: _without_ends(item, strip) for key, item in value.items()}
    return [_without_ends(item, strip) for item in value] if isinstance(value, list | tuple) else value


def problem_with_text(text: Any) -> str:
    """Return the reason why `text` is not a valid text of a row, or ""."""
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return f"expected text, got {kind(text)}"
    if not text.strip():
        return "empty"
    if len(text) > TEXT_CHARS:
        return f"{len(text):,} characters, allowed {TEXT_CHARS:,}"
    # Half of a surrogate pair cannot be encoded, so no tokenizer accepts it.
    return "contains half of a surrogate pair" if _HALF_OF_A_PAIR.search(text) else ""


def kind(value: Any) -> str:
    """Return the type of a value in words for users."""
    if value is None:
        return "nothing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def short(text: str, limit: int = 60) -> str:
    """Cut `text` to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
