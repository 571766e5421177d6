"""The six formats of rows, recognized by their columns, each read into one of the row types.

| format            | columns                                        | becomes                                          |
|-------------------|------------------------------------------------|--------------------------------------------------|
| squad             | context, question, answers (or answer)         | a question about a passage                       |
|                   | [, is_impossible]                              |                                                  |
| chat              | messages [, system, tools]                     | a conversation, every assistant message trained  |
| sharegpt          | conversations [, system, tools]                | the same, of {from, value}                       |
| prompt_completion | prompt, completion (or question, answer)       | one exchange; or messages, the completion trained |
|                   | [, context, system, tools]                     | context, empty line, prompt                      |
| alpaca            | instruction, output                            | one exchange: instruction, empty line, input;    |
|                   | [, input, history, system, tools]              | after those of the history, which are trained    |
| text              | text                                           | a document, every token trained                  |

In csv, a list in a cell of `messages`, `conversations`, `history`, `answers` or `tools` is JSON; an empty `answers` means no answers.
An `id` column names the rows; without one, the position in the file does. Names follow TRL, LLaMA-Factory (whose alpaca `history` is a
list of [instruction, answer]) and the OpenAI chat format. `Question` or ` answer ` is read as the lower-case name without outer spaces,
unless the row has that column as well.

An assistant message with `weight: 0` is not trained, nor one with false (or 0, or "false") in another flag of `turn_flags`, or
`masked: true`. A note reports keys that look like such a flag but are not one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from qlora_lite.data.prompts import alpaca_text, text_with_context
from qlora_lite.data.rows import BadRow, Conversation, Document, Message, Row, kind, problem_with_text, row_name, short
from qlora_lite.data.squad import check_columns
from qlora_lite.data.turn_flags import FLAGS, WrongFlag, is_untrained
from qlora_lite.files.json_text import parse_json

# Format -> its alternative sets of columns; the first format with a matching set wins.
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "squad": (("context", "question", "answers"), ("context", "question", "answer")),
    "chat": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
}
FORMATS = tuple(_COLUMNS)
# Optional columns, besides `id`.
_MORE_COLUMNS: dict[str, tuple[str, ...]] = {
    "squad": ("is_impossible",),
    "chat": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("context", "system", "tools"),
    "alpaca": ("input", "history", "system", "tools"),
    "text": (),
}
KNOWN_NAMES = frozenset(
    {"id", *chain.from_iterable(chain.from_iterable(_COLUMNS.values())), *chain.from_iterable(_MORE_COLUMNS.values())}
)
_LISTS = ("messages", "conversations", "history")  # columns of lists: text in them is JSON
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **{name: name for name in _ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


def find_columns(columns: Sequence[str], *, format: str) -> tuple[str, tuple[str, ...]] | str:
    """-> (format, the columns that decide it) for "auto" or a named format; or the problem, as a sentence."""
    for name in FORMATS if format == "auto" else (format,):
        for required in _COLUMNS[name]:
            if set(required) <= set(columns):
                return name, required
    present = ", ".join(short(column) for column in columns[:30]) or "none"
    if format == "auto":
        known = "; ".join(f"{name}: {_alternatives(name)}" for name in FORMATS)
        return f"no format has these columns: {present}. Known formats: {known}"
    missing = [[f'"{name}"' for name in required if name not in columns] for required in _COLUMNS[format]]
    fewest = min(missing, key=len)
    noun = "column" if len(fewest) == 1 else "columns"
    return f"missing {noun} {' and '.join(fewest)}: {format} needs {_alternatives(format)}. The file has: {present}"


def unused_columns(columns: Sequence[str], *, format: str) -> tuple[str, ...]:
    """Return the columns that rows of `format` do not use; () if the required ones are missing."""
    match = find_columns(columns, format=format)
    used = columns if isinstance(match, str) else {"id", *match[1], *_MORE_COLUMNS[match[0]]}
    return tuple(column for column in columns if column not in used)


def names_of(format: str) -> frozenset[str]:
    """Return every column that rows of `format` may have."""
    return frozenset({"id", *chain.from_iterable(_COLUMNS[format]), *_MORE_COLUMNS[format]})


def known_name(name: str) -> str:
    """Return a column name in lower case, without outer spaces."""
    return name.strip().lower()


def renamed(columns: Iterable[str]) -> dict[str, str]:
    """Columns that differ from known names only in capitals and outer spaces -> the known names; skips ambiguous ones."""
    columns = list(columns)
    normalized = [known_name(name) for name in columns]
    return {
        name: known
        for name, known in zip(columns, normalized, strict=True)
        if known != name and known in KNOWN_NAMES and normalized.count(known) == 1
    }


def are_known(columns: Iterable[str]) -> bool:
    """Whether these columns, apart from capitals and outer spaces, are those of a known format."""
    columns = list(columns)
    names = renamed(columns)
    return not isinstance(find_columns([names.get(name, name) for name in columns], format="auto"), str)


def read_row(format: str, values: dict[str, Any], place: str) -> Row | BadRow:
    """The columns of one row -> the row. `place` names a row without an id, such as "line 7"."""
    name, has_id = row_name(values.get("id"), place)
    if format == "squad":
        return check_columns(values | {"id": name}, place)
    try:
        return _READERS[format](_with_lists(values), name)
    except _Unusable as problem:
        return BadRow(f'id "{short(name)}"' if has_id else place, str(problem))


class _Unusable(Exception):
    """The reason why a row is unusable."""


def _with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Parse the JSON lists in csv cells."""
    cells = {name: values.get(name) for name in _LISTS}
    texts = {name: cell for name, cell in cells.items() if isinstance(cell, str) and cell.lstrip().startswith("[")}
    return values | {name: _parsed(text, name) for name, text in texts.items()}


def _chat(values: dict[str, Any], name: str) -> Conversation:
    return _conversation(name, _messages(values.get("messages"), "messages"), values)


def _sharegpt(values: dict[str, Any], name: str) -> Conversation:
    turns = values.get("conversations")
    if not isinstance(turns, list):
        raise _Unusable(f"conversations: expected a list, got {kind(turns)}")
    messages = []
    for position, turn in enumerate(turns):
        where = f"conversations[{position}]"
        if not isinstance(turn, dict):
            raise _Unusable(f"{where}: expected an object with from and value, got {kind(turn)}")
        speaker = str(turn.get("from"))
        if speaker not in _SHAREGPT_ROLES:
            raise _Unusable(f'{where}.from: expected one of {", ".join(_SHAREGPT_ROLES)}, got "{short(speaker)}"')
        other_keys = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        message = {**other_keys, "role": _SHAREGPT_ROLES[speaker], "content": turn.get("value")}
        if speaker == "function_call":
            message |= {"content": None, "tool_calls": _written_calls(turn.get("value"), f"{where}.value")}
        messages.append(message)
    return _conversation(name, _messages(messages, "conversations"), values)


def _prompt_completion(values: dict[str, Any], name: str) -> Conversation:
    columns = _COLUMNS["prompt_completion"]
    prompt_column, completion_column = columns[0] if any(name in values for name in columns[0]) else columns[1]
    prompt = _as_messages(values.get(prompt_column), "user", prompt_column)
    if not _is_blank(values.get("context")):
        if isinstance(values[prompt_column], list):
            raise _Unusable(f"context: needs {prompt_column} as text, but it is a list of messages")
        prompt = [_user(text_with_context(values[prompt_column], _text(values["context"], "context")))]
    completion = _as_messages(values.get(completion_column), "assistant", completion_column)
    return _conversation(name, [*prompt, *completion], values, num_prompt=len(prompt))


def _alpaca(values: dict[str, Any], name: str) -> Conversation:
    instruction, output = (_text(values.get(column), column) for column in ("instruction", "output"))
    added = "" if _is_blank(values.get("input")) else _text(values["input"], "input")
    asked = [*_history(values.get("history")), _user(alpaca_text(instruction, added))]
    return _conversation(name, [*asked, _assistant(output)], values)


def _history(given: Any) -> list[Message]:
    """Read earlier exchanges in LLaMA-Factory's form: a list of [instruction, answer]."""
    if _is_blank(given):
        return []
    if not isinstance(given, list):
        raise _Unusable(f"history: expected a list of [instruction, answer], got {kind(given)}")
    messages: list[Message] = []
    for position, pair in enumerate(given):
        where = f"history[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Unusable(f"{where}: expected [instruction, answer]")
        messages += [_user(_text(pair[0], where)), _assistant(_text(pair[1], where))]
    return messages


def _document(values: dict[str, Any], name: str) -> Document:
    return Document(name, _text(values.get("text"), "text"))


_READERS: dict[str, Callable[[dict[str, Any], str], Conversation | Document]] = {
    "chat": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _document,
}


def _conversation(name: str, messages: list[Message], values: dict[str, Any], *, num_prompt: int = 0) -> Conversation:
    """Build the conversation up to its last trained message; trained tokens do not see later messages."""
    if not _is_blank(values.get("system")) and messages and messages[0]["role"] != "system":
        system = {"role": "system", "content": _text(values["system"], "system")}
        messages, num_prompt = [system, *messages], num_prompt + 1
    row = Conversation(name, tuple(messages), _tools(values.get("tools")), first_trained=max(1, num_prompt))
    if not row.trained_turns:
        weights = (
            " and a weight other than 0 (nor train: false)" if any("weight" in message for message in messages) else ""
        )
        raise _Unusable(f"nothing to train: no assistant message after another message{weights}")
    return replace(row, messages=row.messages[: row.trained_turns[-1] + 1])


def _messages(given: Any, where: str) -> list[Message]:
    if not isinstance(given, list):
        raise _Unusable(f"{where}: expected a list of messages, got {kind(given)}")
    return [_message(message, f"{where}[{position}]") for position, message in enumerate(given)]


def _as_messages(given: Any, role: str, where: str) -> list[Message]:
    """Read text as one message of that role, or TRL's list of messages."""
    return _messages(given, where) if isinstance(given, list) else [{"role": role, "content": _text(given, where)}]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise _Unusable(f"{where}: expected an object with role and content, got {kind(message)}")
    if message.get("role") not in _ROLES:
        raise _Unusable(f'{where}.role: expected one of {", ".join(_ROLES)}, got "{short(str(message.get("role")))}"')
    kept = {key: value for key, value in message.items() if value is not None}
    content = _joined(kept.get("content", ""), where)
    try:
        is_left_out = is_untrained({key: kept.pop(key) for key in FLAGS if key in kept}, where)
    except WrongFlag as error:
        raise _Unusable(str(error)) from error
    calls = _tool_calls(kept.pop("tool_calls", []), f"{where}.tool_calls")
    may_be_empty = bool(calls) or message["role"] in ("system", "tool")
    content = "" if _is_blank(content) and may_be_empty else _text(content, f"{where}.content")
    weight = {"weight": 0} if is_left_out and message["role"] == "assistant" else {}
    return kept | {"content": content} | ({"tool_calls": calls} if calls else {}) | weight


def _joined(content: Any, where: str) -> Any:
    """Join the text parts of OpenAI's list form of a content."""
    if not isinstance(content, list):
        return content
    for position, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            part_type = part.get("type") if isinstance(part, dict) else kind(part)
            raise _Unusable(f"{where}.content[{position}]: only parts of type text are supported, got {part_type}")
    return "".join(part["text"] for part in content)


def _tool_calls(given: Any, where: str) -> list[Any]:
    """Parse the arguments of calls, JSON text in the OpenAI format; chat templates expect the object."""
    if not isinstance(given, list):
        raise _Unusable(f"{where}: expected a list, got {kind(given)}")
    calls = []
    for position, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Unusable(f"{where}[{position}]: expected an object with function.name and function.arguments")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}[{position}].function.arguments")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _written_calls(given: Any, where: str) -> list[Any]:
    """Convert the text of a sharegpt turn, a call {"name", "arguments"} or a list of them, to the OpenAI format."""
    calls = _parsed(given, where) if isinstance(given, str) else given
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise _Unusable(f"{where}: expected a call, an object with name and arguments, as JSON")
    return [{"type": "function", "function": call} for call in calls]


def _tools(given: Any) -> tuple[Any, ...]:
    if _is_blank(given):
        return ()
    tools = _parsed(given, "tools") if isinstance(given, str) else given
    if not isinstance(tools, list):
        raise _Unusable(f"tools: expected a list of JSON schemas, got {kind(tools)}")
    return tuple(tools)


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _Unusable(f"{where}: not JSON: {str(error)[:100]}") from error


def _is_blank(given: Any) -> bool:
    return given is None or (isinstance(given, str) and not given.strip())


def _text(given: Any, where: str) -> str:
    if problem := problem_with_text(given):
        raise _Unusable(f"{where}: {problem}")
    assert isinstance(given, str)
    return given


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _alternatives(format: str) -> str:
    return " or ".join(", ".join(columns) for columns in _COLUMNS[format])
