"""YAML text -> values with their lines. No content of a file makes this hang, recurse or run code.

In: the text of a recipe, or one `--set section.key=value`. Out: `Node`s. Raises `YamlProblem`s with a line.

Surprising, and on purpose:
- Numbers and words are read as in YAML 1.2, not as in PyYAML's YAML 1.1: `2e-4` is a number (PyYAML: text),
  `no` and `on` are text (PyYAML: false and true), `010` is ten (PyYAML: eight).
- Anchors, aliases, tags and several documents are refused: a recipe does not need them, and YAML bombs and
  `!!python/object` attacks do.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from qlora_lite.files.text_file import NotText, TooLarge, decode_file
from qlora_lite.limits import RECIPE_BYTES, RECIPE_DEPTH, RECIPE_VALUES

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # YAML 1.2, section 5.1


class YamlProblem(Exception):
    """The text is not plain YAML; `line` counts from 1."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        self.text = text
        super().__init__(f"line {line}: {text}")


@dataclass(frozen=True)
class Node:
    """A value and its line. `value` is None, bool, int, float, str, a list of values, or a Mapping."""

    value: Any
    line: int
    source: str  # as written, for "got ..."


@dataclass(frozen=True)
class Mapping:
    """The keys of a mapping in the order of the file; a key may occur twice. Each Node's line is that of its key."""

    items: tuple[tuple[str, Node], ...]


def decode(data: bytes) -> tuple[str, str]:
    """Decode the bytes of a recipe -> (text, a note on its encoding). Raises YamlProblem when it is too large or not text."""
    try:
        text, note = decode_file(data, longest=RECIPE_BYTES)
    except TooLarge as error:
        raise YamlProblem(1, f"{error}; a recipe has a few thousand. Is this the right file?") from error
    except NotText as error:
        raise YamlProblem(error.line, str(error)) from error
    match = _UNPRINTABLE.search(text)
    if match:
        line = text.count("\n", 0, match.start()) + 1
        code = f"U+{ord(match.group()):04X}"
        raise YamlProblem(line, f"character {code} is not allowed in YAML; remove it (is this a binary file?)")
    return text, note


def parse(text: str) -> Node:
    """Parse the text of a whole recipe -> its top node. Raises YamlProblem at the first construct that is not plain YAML."""
    try:
        _refuse_exotic_yaml(text)
        top = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        tab = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        context = f"{error.context}: " if error.context else ""
        raise YamlProblem(line, f"not valid YAML: {context}{error.problem}{tab}") from error
    except yaml.YAMLError as error:  # e.g. an unprintable character that came in through --set
        raise YamlProblem(1, f"not valid YAML: {error}") from error
    except (ValueError, OverflowError) as error:  # PyYAML calls chr() on escapes such as "\UFFFFFFFF" unchecked
        raise YamlProblem(1, f"not valid YAML: invalid escape in quoted text ({error})") from error
    return Node(None, 1, "") if top is None else _node(top, top.start_mark.line + 1)


def parse_value(text: str) -> Node:
    """Parse the right side of `--set key=value`: a list `[a, b]` or quoted text as in YAML, anything else literally."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{", '"', "'"):
        return parse(stripped)
    return Node(plain_value(stripped), 1, stripped)


def plain_value(text: str) -> Any:
    """Return the value of unquoted text: null, a bool, a number, or the text itself (YAML 1.2 core schema, decimal only)."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 1000 else text  # Python refuses to read ints of many thousand digits
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _refuse_exotic_yaml(text: str) -> None:
    """Walk the events, without recursion and without building values, and stop at the first that is out of bounds."""
    depth = num_documents = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if number > RECIPE_VALUES:
            raise YamlProblem(line, f"more than {RECIPE_VALUES:,} values; a recipe has fewer than 100")
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                raise YamlProblem(line, 'a second document starts here ("---"); a recipe is one document')
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            raise YamlProblem(
                line,
                f"anchors and aliases (&{event.anchor}, *{event.anchor}) are refused; "
                "write the value in full, or quote it if it is text",
            )
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise YamlProblem(line, f"tags ({event.tag}) are refused; write a plain value, or quote it if it is text")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > RECIPE_DEPTH:
                raise YamlProblem(line, f"nested more than {RECIPE_DEPTH} levels deep; a recipe has sections and keys")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _node(node: yaml.Node, line: int) -> Node:
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None  # ' " | >
        return Node(node.value if quoted else plain_value(node.value), line, node.value)
    if isinstance(node, yaml.SequenceNode):
        return Node([_value(item) for item in node.value], line, "a list")
    items = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlProblem(key.start_mark.line + 1, "a key must be a word, not a list or a mapping")
        items.append((key.value, _node(value, key.start_mark.line + 1)))
    return Node(Mapping(tuple(items)), line, "a mapping")


def _value(node: yaml.Node) -> Any:
    return _node(node, node.start_mark.line + 1).value
