"""Mutations: valid input in, hostile input out. Everything is drawn from the `Random` that is given, so a seed names a case for ever.

mutate_bytes   a file as bytes: flipped, cut, doubled, numbers made extreme
mutate_text    words of a text: dropped, doubled, swapped, replaced by others that are known to hurt
mutate_json    the tree of a document: a value of another type, a key gone, a list grown; as text, so that it may also hold what
               `json.dumps` would not write (numbers of 5,000 digits, 2,000 brackets, a key twice)
"""

import json
import re
import struct
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

_INTEGERS = (0, 1, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    *("..", "../../outside/secret.safetensors", "/etc/passwd", "C:\\outside", "\\\\host\\share", "\0", "\x1b[2J", "\r", "\ufeff"),
    *("null", "true", "NaN", "-Infinity", "1e999", "-1", "0", "99999999999999999999", "0x7f", "1_000", "é", "\ud7ff", "\U0010ffff"),
    *("[", "]", "{", "}", '"', "'", ":", ",", "#", "&a", "*a", "!!python/object", "<<", "---", "|", ">", "%", "@", "`", "\t", "\n", " "),
    *("{{", "}}", "{%", "%}", "__class__", "a" * 5000, "(a+)+$", "[[" * 200, "💥"),
)  # fmt: skip
# Stand for text that json.dumps cannot write.
_RAW = {
    "@raw:deep-list@": "[" * 2000 + "]" * 2000,
    "@raw:deep-map@": '{"a":' * 2000 + "1" + "}" * 2000,
    "@raw:digits@": "9" * 5000,
    "@raw:infinite@": "1e999",
    "@raw:twice@": '{"a": 1, "a": [2]}',
    "@raw:surrogate@": '"\\ud800"',
    "@raw:nul@": '"a\\u0000b"',
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 63, 2**31, 2**53, 2**63, -(2**63), 0.5, -0.0, 1e308, float("nan")),
    *("", " ", "a", "..", "../../outside/secret.safetensors", "/etc/passwd", "C:\\x", "é💥", "x" * 3000, "1", "true", "(a+)+$", "{{ 1 }}"),
    *([], {}, [[]], [None], [1, 2, 3], {"a": 1}, {"": {}}, ["a", "b"], [{}], [[1, [2, [3]]]], *_RAW),
)  # fmt: skip
_ROOT_VALUES = ([], 1, "text", None, "@raw:deep-list@", "@raw:deep-map@")


def mutate_bytes(data: bytes, rng: Random, *, words: Sequence[str] = _WORDS) -> bytes:
    """One to four changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _change_bytes(bytearray(data), rng, words)
    return data


def mutate_text(text: str, rng: Random, *, words: Sequence[str] = ()) -> str:
    """One to four changes of words and signs; `words` are added to the hostile ones, and drawn as often as all those."""
    parts = re.findall(r"\w+|\s+|[^\w\s]", text) or [""]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        word = rng.choice(words) if words and rng.random() < 0.6 else rng.choice(_WORDS)
        match rng.randrange(6):
            case 0 if len(parts) > 1:
                del parts[at]
            case 1:
                parts[at], parts[other] = parts[other], parts[at]
            case 2:
                parts[at] = word
            case 3:
                parts[at:at] = parts[min(at, other) : max(at, other)][:50]
            case _:
                parts.insert(at, word)
    return "".join(parts)


def mutate_json(document: Any, rng: Random, *, values: Sequence[Any] = ()) -> str:
    """One to three changes of the tree, as JSON text; `values` are drawn as often as all the usual hostile ones."""
    if rng.random() < 0.03:
        return _as_text(rng.choice(_ROOT_VALUES))
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [place for place in _places(document) if place[0] is not None]
        if not places:
            break
        holder, key = rng.choice(places)
        _change_place(holder, key, rng, values)
    return _as_text(document)


def mutate_keys(document: dict[str, Any], keys: Sequence[str], rng: Random, *, values: Sequence[Any] = ()) -> str:
    """`mutate_json` of these keys of a document, the others as they are."""
    changed = mutate_json({key: document[key] for key in keys}, rng, values=values)
    rest = json.dumps({key: value for key, value in document.items() if key not in keys})
    if not changed.startswith("{") or changed == "{}" or rest == "{}":
        return changed
    return f"{rest[:-1]}, {changed[1:]}"


def _change_bytes(data: bytearray, rng: Random, words: Sequence[str]) -> bytes:
    size = len(data)
    at = rng.randrange(size + 1)
    length = min(rng.choice((1, 2, 4, 8, 64, 1000)), size - at)
    match rng.randrange(9):
        case 0 if size > at:
            data[at] ^= 1 << rng.randrange(8)
        case 1 if size > at:
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 100))
        case 5:
            data[at:at] = rng.choice(words).encode("utf-8", "surrogatepass")
        case 6:
            number = struct.pack("<Q", rng.choice(_INTEGERS))[: rng.choice((1, 2, 4, 8))]
            data[at : at + len(number)] = number
        case 7:
            data[at : at + length] = rng.randbytes(length)
        case _:
            other = rng.randrange(size + 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value below the root."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else []
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found


def _change_place(holder: Any, key: Any, rng: Random, values: Sequence[Any]) -> None:
    value = holder[key]
    kind = rng.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", "", "__class__", "../" + str(key), str(key).upper()))] = holder.pop(key)
    elif kind == 2:
        holder[key] = [value] if rng.random() < 0.5 else {"a": value}
    elif kind == 3 and isinstance(holder, list):
        holder.extend(deepcopy(value) for _ in range(rng.choice((1, 50))))
    elif kind == 4 and isinstance(value, int | float):
        holder[key] = rng.choice((-value, value + 1, value * 1000, value * 2**40, value - 1, value / 3, str(value), 0))
    elif kind == 4 and isinstance(value, str):
        holder[key] = mutate_text(value[:2000], rng)
    elif values and rng.random() < 0.5:
        holder[key] = deepcopy(rng.choice(values))
    else:
        holder[key] = deepcopy(rng.choice(_VALUES))


def _as_text(document: Any) -> str:
    text = json.dumps(document)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text
