"""NaN and Infinity, which Python's json writes and JSON does not have, read as null: the same rows as from jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data import json_stream
from qlora_lite.data.json_stream import _NullForNaN, build, read_events


def value_of(path: Path) -> Any:
    events = read_events(path)
    event, value = next(events)
    return build(path, event, value, events)


def test_a_list_of_rows_with_missing_numbers_is_read(tmp_path: Path) -> None:
    rows = [{"question": "NaN?", "answer": 'say "NaN" \\', "score": float("nan"), "low": float("-inf")}, {"score": 1}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert value_of(path) == [{**rows[0], "score": None, "low": None}, {"score": 1}]


class InPieces:
    """A file that is read a few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def read(self, size: int = -1) -> bytes:
        piece = self._data[self._at : self._at + self._size]
        self._at += len(piece)
        return piece


TEXTS = st.text(alphabet='NaIinfity-"\\ u0é', max_size=12)
VALUES = st.recursive(
    st.one_of(TEXTS, st.sampled_from([float("nan"), float("inf"), float("-inf"), 1.5, None, True])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@given(VALUES, st.integers(1, 11))
def test_nothing_else_changes_whatever_the_blocks(value: Any, size: int) -> None:
    text = json.dumps(value)
    stream, out = _NullForNaN(InPieces(text.encode(), size)), b""  # type: ignore[arg-type]
    while piece := stream.read(size):
        out += piece
    assert json.loads(out) == json.loads(text, parse_constant=lambda name: None)


def test_a_file_without_such_numbers_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_NullForNaN", lambda stream: pytest.fail("no NaN here"))
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "Not a Number"}]', encoding="utf-8")
    assert value_of(path) == [{"a": "Not a Number"}]
