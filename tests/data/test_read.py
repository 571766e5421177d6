"""Files with weights: how many rows of each, which ones, and bad rows counted and named whatever the format."""

import json

import pytest

from qlora_lite.data.read import file_identity, find_format, format_of_held_out, read_mix
from qlora_lite.data.rows import Document
from qlora_lite.errors import DataError
from tests.data.conftest import question, squad


@pytest.fixture
def texts(tmp_path):
    def write_texts(name, num_rows, bad=()):
        lines = [json.dumps({"text": "" if i in bad else f"{name} {i}"}) for i in range(num_rows)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write_texts


def rows_of(*pairs, **settings):
    """The texts that are taken, in their order."""
    return [row.text for row in read_mix(pairs, **settings)]


@pytest.mark.parametrize(("weight", "num_rows"), [(1, 10), (2, 20), (0.5, 5), (2.5, 25), (0.26, 3), (1.1, 11)])
def test_a_weight_takes_so_many_rows_the_same_ones_every_time(texts, weight, num_rows):
    path = texts("a", 10)
    taken = rows_of((path, weight))
    assert len(taken) == num_rows == round(weight * 10) == read_mix([(path, weight)]).num_rows
    counts = [taken.count(f"a {i}") for i in range(10)]
    assert set(counts) <= {int(weight), int(weight) + 1}
    assert taken == sorted(taken), "in the order of the file"
    assert taken == rows_of((path, weight))


def test_a_limit_is_shared_out_in_proportion_to_what_each_file_gives(texts):
    large, small = texts("a", 60), texts("b", 10)
    taken = rows_of((large, 0.5), (small, 3), num_rows=20)
    assert (sum(t.startswith("a") for t in taken), sum(t.startswith("b") for t in taken)) == (10, 10)
    whole = rows_of((large, 0.5), (small, 3))
    assert len(whole) == 60
    assert [t for t in whole if t.startswith("a")][:10] == taken[:10], "the first ones of those that a whole run takes"
    assert taken[10:] == ["b 0"] * 3 + ["b 1"] * 3 + ["b 2"] * 3 + ["b 3"]
    for num_rows in range(1, 61):
        assert len(rows_of((large, 0.5), (small, 3), num_rows=num_rows)) == num_rows
    assert len(rows_of((large, 1), num_rows=1000)) == 60


def test_rows_of_several_files_carry_the_name_of_their_file(texts):
    mix = read_mix([(texts("a", 2), 1), (texts("b", 1), 1)])
    assert [row.id for row in mix] == ["a.jsonl line 1", "a.jsonl line 2", "b.jsonl line 1"]
    assert list(read_mix(texts("a", 2))) == [Document("line 1", "a 0"), Document("line 2", "a 1")]


def test_bad_rows_are_counted_named_and_refused_beyond_the_share_in_every_file(texts):
    good, bad = texts("a", 50), texts("b", 100, bad=(3, 4))
    mix = read_mix([(good, 1), (bad, 1)])
    assert (mix.num_rows, mix.num_bad) == (148, 2)
    assert mix.bad == ("b.jsonl line 4: text: empty", "b.jsonl line 5: text: empty")
    with pytest.raises(DataError, match=r"c\.jsonl: 3 of 100 rows cannot be used \(3\.0%, allowed 2%\)"):
        read_mix([(good, 1), (texts("c", 100, bad=(1, 2, 3)), 1)])


def test_weights_that_leave_no_row_are_refused(texts):
    with pytest.raises(DataError, match="the weights leave no row"):
        read_mix([(texts("a", 10), 0.01)])


def test_the_format_is_said_with_its_reason(texts, write):
    nested = write(squad(question("a", "Which river?", "The Nile")))
    chat = write('{"messages": []}', "chat.jsonl")
    assert find_format(texts("a", 1), format="auto") == ("text", "a.jsonl: it has the column text")
    assert find_format(nested, format="auto") == ("squad", "data.json: nested, as SQuAD is published")
    assert find_format(chat, format="text") == ("text", "asked for")
    format, reason = find_format([(nested, 1), (chat, 1)], format="auto")
    assert format == "auto"
    assert "data.json is squad" in reason and "chat.jsonl is chat: it has the column messages" in reason


@pytest.mark.parametrize(
    ("format", "row", "held_out"),
    [
        ("chat", {"text": "a", "messages": []}, "chat"),
        ("text", {"text": "a", "messages": []}, "text"),
        ("alpaca", {"text": "a", "messages": []}, "chat"),
        ("squad", {"prompt": "a", "completion": "b"}, "prompt_completion"),
        ("prompt_completion", {"context": "a", "question": "b", "answer": "c"}, "prompt_completion"),
        ("auto", {"context": "a", "question": "b", "answer": "c"}, "squad"),
    ],
)
def test_held_out_rows_are_of_the_training_rows_format_where_they_can_be(write, format, row, held_out):
    assert format_of_held_out(write([row], "rows.json"), format=format) == held_out


def test_a_nested_file_of_held_out_rows_is_squad_whatever_was_trained(write):
    nested = write(squad(question("a", "Which river?", "The Nile")))
    assert {format_of_held_out(nested, format=format) for format in ("chat", "squad", "auto")} == {"squad"}
    with pytest.raises(DataError, match="no format has these columns: x"):
        format_of_held_out(write('{"x": 1}\n', "x.jsonl"), format="squad")


def test_files_of_several_formats_can_be_mixed(texts, write):
    mix = read_mix([(write(squad(question("a", "Which river?", "The Nile"))), 1), (texts("b", 1), 1)])
    assert mix.format == "squad and text"
    assert [row.id for row in mix] == ["data.json a", "b.jsonl line 1"]


def test_a_format_that_a_file_is_not_is_refused(texts, write):
    with pytest.raises(
        DataError, match=r'missing column "messages": chat needs .*The file has: text\. .*another data\.format'
    ):
        read_mix(texts("a", 1), format="chat")
    with pytest.raises(DataError, match="one JSON object, which only SQuAD files are"):
        read_mix(write(squad(question("a", "Which river?", "The Nile"))), format="chat")
    with pytest.raises(DataError, match="no format has these columns: x"):
        read_mix(write('{"x": 1}\n', "x.jsonl"))


def test_what_decides_the_rows_of_a_file_is_its_content_and_whether_it_is_csv_or_tsv(write):
    first = file_identity(write("a,b\n1,2\n", "rows.csv"))
    assert file_identity(write("a,b\n1,2\n", "again.csv")) == first
    assert file_identity(write("a,b\n1,2\n", "rows.tsv")) != first != file_identity(write("a,b\n1,3\n", "rows.csv"))
