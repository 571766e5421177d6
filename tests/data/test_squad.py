"""Reading SQuAD: good files row by row, bad rows counted and named, hostile files as one clear error."""

import json
import os

import pytest

from qlora_lite.data import files as module
from qlora_lite.data.read import read_mix
from qlora_lite.data.rows import QuestionRow
from qlora_lite.errors import DataError
from qlora_lite.limits import TEXT_CHARS
from tests.data.conftest import CONTEXT, question, squad


def read_squad(path, **settings):
    (file,) = read_mix(path, format="squad", **settings).files
    return file


GOOD = [question(f"good{i}", "Which river?", "The Nile") for i in range(99)]


def test_answerable_and_unanswerable_questions_are_read(write):
    path = write(squad(question("a", "Which river?", "The Nile", "Nile"), question("b", "Who built it?")))
    file = read_squad(path)
    assert (file.num_rows, file.num_bad, file.bad) == (2, 0, ())
    assert list(file) == [
        QuestionRow("a", CONTEXT, "Which river?", ("The Nile", "Nile"), 0),
        QuestionRow("b", CONTEXT, "Who built it?", ()),
    ]
    assert list(file) == list(file), "a file can be iterated again"


def test_keys_in_any_order_and_unknown_keys_are_accepted(write):
    row = '{"answers": [{"answer_start": 4, "text": "Nile", "x": [1]}], "plausible_answers": [], "question": "Q?", "id": "a"}'
    text = '{"x": [[{}]], "data": [{"paragraphs": [{"qas": [ROW], "context": "The Nile"}], "title": null}], "z": 1.5}'.replace(
        "ROW", row
    )
    assert list(read_squad(write(text))) == [QuestionRow("a", "The Nile", "Q?", ("Nile",), 4)]


def test_an_answer_found_elsewhere_in_the_context_is_usable(write):
    row = question("a", "Which town?", "Cairo")
    row["answers"][0]["answer_start"] = 3
    assert next(iter(read_squad(write(squad(row))))).answer_start == CONTEXT.index("Cairo")


def test_a_byte_order_mark_is_skipped(write):
    assert read_squad(write(b"\xef\xbb\xbf" + json.dumps(squad(*GOOD)).encode())).num_rows == 99


def changed(**changes):
    row = question("bad", "Which river?", "Nile") | changes
    return {key: value for key, value in row.items() if value != "REMOVED"}


BAD_ROWS = [
    (changed(question="REMOVED"), 'id "bad": question: missing'),
    (changed(question="  "), 'id "bad": question: empty'),
    (changed(question=5), 'id "bad": question: expected text, got a number'),
    (changed(question="\ud800"), "question"),
    (changed(answers=[]), "no answers, but is_impossible is not true"),
    (changed(answers="REMOVED"), "no answers"),
    (changed(answers={"text": ["Nile"]}), "answers: expected a list, got an object"),
    (changed(answers=["Nile"]), "answers[0]: expected an object with text and answer_start, got text"),
    (
        changed(answers=[{"text": "Amazon", "answer_start": 0}]),
        'answers[0].text: "Amazon" does not occur in the context',
    ),
    (changed(answers=[{"answer_start": 0}]), "answers[0].text: missing"),
    (changed(answers=[{"text": ""}]), "answers[0].text: empty"),
    (changed(is_impossible=True), "is_impossible is true, but there are 1 answers"),
    (changed(is_impossible="no"), "is_impossible: expected true or false, got text"),
    ("a question", "data[0].paragraphs[0].qas[99]: expected an object, got text"),
    (None, "expected an object, got nothing"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_counted_and_named(write, row, reason):
    if isinstance(row, dict) and row.get("question") == "\ud800":  # the parser may replace it by "?", which is usable
        assert read_squad(write(squad(*GOOD, row))).num_bad in (0, 1)
        return
    file = read_squad(write(squad(*GOOD, row)))
    assert (file.num_rows, file.num_bad) == (99, 1)
    assert reason in file.bad[0]
    assert len(list(file)) == 99


@pytest.mark.parametrize("context", [None, 5, "", ["The Nile"], "x" * (TEXT_CHARS + 1)])
def test_a_bad_context_makes_its_questions_bad(write, context):
    with pytest.raises(DataError, match=r'id "a": context: '):
        read_squad(write(squad(question("a", "Which river?", "Nile"), context=context)))


def test_ids_of_any_kind_are_read_as_in_flat_rows(write):
    ids = [262744, 262744, 7.0, 0.5, True, None, "", "  ", [1], {"a": 1}, "x", "REMOVED", "\ud800", -3]
    rows = list(read_squad(write(squad(*(changed(id=each) for each in ids)))))
    place = "data[0].paragraphs[0].qas[{}]".format
    wanted = ["262744", "262744", "7", "0.5", *map(place, range(4, 10)), "x", place(11), place(12), "-3"]
    assert [row.id for i, row in enumerate(rows) if i != 12] == [name for i, name in enumerate(wanted) if i != 12]
    flat = [{"context": CONTEXT, **changed(id=each)} for each in ids]
    names = [row.id for row in read_mix(write("\n".join(map(json.dumps, flat)), "flat.jsonl"))]
    assert names == [f"line {i + 1}" if name.startswith("data[") else name for i, name in enumerate(wanted)]


def test_a_key_given_twice_makes_the_passage_bad_where_it_is_read_and_changes_nothing_elsewhere(write):
    text = json.dumps(squad(*GOOD))
    assert read_squad(write(text.replace('"title": "Nile"', '"title": {"a": 1, "a": 2}'))).num_rows == 99
    twice = '{"context": "The Nile", "context": "The Amazon", "qas": []}'
    file = read_squad(write(text.replace('"paragraphs": [', f'"paragraphs": [{twice}, ')))
    assert (file.num_rows, file.num_bad) == (99, 1)
    assert file.bad[0].startswith('data[0].paragraphs[0]: the key "context" is given twice')
    paragraphs = '{"data": [{"paragraphs": {"a": 1, "a": 2}}]}'
    with pytest.raises(DataError, match="paragraphs qas: expected a list of questions"):
        read_squad(write(paragraphs))


def test_ids_of_several_rows_are_counted_and_said(write):
    rows = [changed(id=each) for each in ("a", "b", "a", "a")]
    mix = read_mix(write(squad(*rows)))
    assert mix.notes == ('data.json: rows with the id of an earlier row: 2, the first "a"; all are used',)
    assert mix.num_rows == 4


def test_more_bad_rows_than_allowed_are_refused_by_name(write):
    bad = [changed(id=f"bad{i}", question="") for i in range(9)]
    path = write(squad(*GOOD, *bad))
    with pytest.raises(DataError) as caught:
        read_squad(path)
    lines = str(caught.value).splitlines()
    assert str(path) in lines[0] and "9 of 108 rows" in lines[0] and "allowed 2%" in lines[0]
    assert lines[1:] == [f'  id "bad{i}": question: empty' for i in range(5)] + ["  ... and 4 more"]
    assert read_squad(path, max_bad_share=0.5).num_bad == 9


def test_only_twenty_bad_rows_are_kept_by_name(write):
    bad = [changed(id=f"bad{i}", question="") for i in range(30)]
    file = read_squad(write(squad(*GOOD, *bad)), max_bad_share=0.5)
    assert (file.num_bad, len(file.bad)) == (30, 20)


DEEP = 100_000
HOSTILE = {
    "empty file": (b"", "the file is empty"),
    "whitespace": (b" \n ", "not JSON"),
    "binary": (bytes(range(256)) * 40, "a binary file"),
    "gzip": (b"\x1f\x8b\x08\x00abc", "gzip"),
    "parquet": (b"PAR1\x15\x04", "cannot be read as Parquet"),
    "utf-16 without a mark": ('{"data": []}'.encode("utf-16-le"), "UTF-16-LE without a byte order mark"),
    "utf-16 cut off": ('{"data": []}'.encode("utf-16")[:-1], "begins as UTF-16, but is not UTF-16 here"),
    "not utf-8": (b'{"data": [{"title": "\xff"}]}', "not JSON"),
    "jsonl": (b'{"question": "a"}\n{"question": "b"}\n', 'missing columns "context" and "answers"'),
    "csv": (b"id,context,question\n1,a,b\n", "not JSON"),
    "cut off": (b'{"data": [{"paragraphs": [', "not JSON"),
    "trailing text": (b'{"data": []} x', "not JSON"),
    "NaN": (b'{"data": [{"paragraphs": [NaN]}]}', "data[0].paragraphs[0]: expected an object, got nothing"),
    "huge number": (b'{"data": [' + b"1" * 5000 + b"]}", "not JSON"),
    "deep": (b"[" * DEEP, "nested more than 64 levels"),
    "deep and closed": (b'{"data": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested more than 64 levels"),
    "deep elsewhere": (
        b'{"x": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b', "data": []}',
        "nested more than 64 levels",
    ),
    "a list": (b"[]", "no rows"),
    "a list of texts": (b'["x"]', "row 1: expected an object, got text"),
    "a number": (b"5", "expected an object"),
    "no data": (b"{}", 'no "data" list'),
    "data is text": (b'{"data": "x"}', '"data" must be a list of articles, got text'),
    "no rows": (b'{"data": []}', "no questions"),
    "no qas": (b'{"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}', "no questions"),
    "article is text": (b'{"data": ["x"]}', "data[0]: expected an object, got text"),
    "no paragraphs": (b'{"data": [{"title": "x"}]}', "data[0].paragraphs: expected an object, got nothing"),
    "paragraphs is text": (b'{"data": [{"paragraphs": "x"}]}', "data[0].paragraphs: expected an object, got text"),
    "paragraph is a list": (
        b'{"data": [{"paragraphs": [[]]}]}',
        "data[0].paragraphs[0]: expected an object, got a list",
    ),
    "qas is an object": (
        b'{"data": [{"paragraphs": [{"qas": {}}]}]}',
        "qas: expected a list of questions, got an object",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_squad_is_one_clear_error(write, name):
    content, said = HOSTILE[name]
    path = write(content)
    with pytest.raises(DataError) as caught:
        read_squad(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_path_that_is_no_readable_file_is_one_clear_error(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {
        "missing.json": "No such file",
        ".": "neither a",
        "pipe": "not a regular file",
        "loop": "loop",
        "a\0b": "NUL",
    }
    for place, said in places.items():
        with pytest.raises(DataError, match=said):
            read_squad(tmp_path / place)


def test_a_file_above_the_limit_is_refused_with_both_sizes(write, monkeypatch):
    monkeypatch.setattr(module, "DATA_FILE_BYTES", 100)
    with pytest.raises(DataError, match=r"KiB, allowed 100 B"):
        read_squad(write(squad(*GOOD)))
