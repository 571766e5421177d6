"""Files of rows: the same rows from every kind of file, streamed; files that are none are one clear error."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from qlora_lite.data import tables
from qlora_lite.data.tables import file_kind, open_table
from qlora_lite.errors import DataError

ROWS = [{"prompt": 'Wo, "da"?\nHier?', "completion": "Überall 🐪"}, {"prompt": "b", "completion": "c"}]


def write_rows(folder, kind):
    """ROWS as a file of that kind."""
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        path.write_text("\n".join(lines) + "\n" if kind == "jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    elif kind in ("csv", "tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    return path


KINDS = {"jsonl": "jsonl", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "saved": "saved"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = write_rows(tmp_path, kind)
    assert file_kind(path) == KINDS[kind]
    table = open_table(path, file_kind(path))
    assert table.columns == ("prompt", "completion")
    assert [values for _, values in table.rows] == ROWS


def test_jsonl_is_recognised_under_another_name_and_keeps_its_line_numbers(write):
    path = write(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n', "rows.json")
    assert file_kind(path) == "jsonl"
    assert list(open_table(path, "jsonl").rows) == [("line 1", {"text": "a"}), ("line 3", {"text": "b"})]


def test_a_nested_squad_file_on_one_line_is_no_jsonl(write):
    assert file_kind(write({"version": "v2.0", "data": []})) == "squad"


def test_a_document_whose_last_row_has_a_line_of_its_own_is_no_jsonl(write):
    article = '{"title": "a", "paragraphs": []}'
    assert file_kind(write(f'{{"data": [\n{article},\n{article}\n]}}\n'.encode())) == "squad"
    assert file_kind(write(f'{{"data": [\n{article}\n]}}\n'.encode())) == "squad"
    assert file_kind(write(b'{"data": [\n{"text": "a"},\n{"text": "b"}\n]}\n')) == "wrapped"
    assert file_kind(write(b'{"text": \n{"text": "a"}\n{"text": "b"}\n')) == "jsonl"


def test_lines_and_items_that_are_no_objects_are_named_and_the_rest_is_read(write):
    lines = write('{"text": "a"}\n{"text":\n[1]\n{"text": "b"}\n', "rows.jsonl")
    (_, first), (bad, why), (other, why_other), (_, last) = open_table(lines, "jsonl").rows
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert (bad, other, why_other) == ("line 2", "line 3", "expected an object, got a list")
    assert why.startswith("not JSON: ")
    items = open_table(write('[{"text": "a"}, 5, {"text": "b"}]', "rows.json"), "json")
    assert list(items.rows)[1] == ("row 2", "expected an object, got a number")


def test_csv_rows_of_another_width_than_the_header_are_named(write):
    table = open_table(write("a,b\n1,2\n1\n1,2,3\n", "rows.csv"), "csv")
    assert list(table.rows) == [
        ("row 1", {"a": "1", "b": "2"}),
        ("row 2", "only 1 cells, but the header has 2 (line 3)"),
        ("row 3", "more cells than the 2 of the header (line 4); quote cells that contain the delimiter"),
    ]


def test_a_csv_file_holds_answerable_and_unanswerable_questions_and_conversations(tmp_path):
    import csv

    from qlora_lite.data.read import read_mix

    def written(name, rows):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return list(read_mix(tmp_path / name))

    asked = {"context": "The Nile flows.", "question": "Which?"}
    answers = ("The Nile", json.dumps(["The Nile", "Nile"]), "")
    rows = written("squad.csv", [asked | {"answers": cell} for cell in answers])
    assert [row.answers for row in rows] == [("The Nile",), ("The Nile", "Nile"), ()]
    marked = (("The Nile", "False"), ("", "True"))
    rows = written("marked.csv", [asked | {"answer": cell, "is_impossible": flag} for cell, flag in marked])
    assert [row.answers for row in rows] == [("The Nile",), ()]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (row,) = written("chat.csv", [{"messages": json.dumps(talk)}])
    assert list(row.messages) == talk


def test_a_cell_may_be_as_long_as_a_text_may_be(write):
    text = "word " * 40_000
    ((_, values),) = open_table(write(f'text\n"{text}"\n', "rows.csv"), "csv").rows
    assert values == {"text": text}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_keys_that_only_other_rows_have_are_not_there(tmp_path, kind):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]},
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    path = tmp_path / kind
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    assert [values for _, values in open_table(path, kind).rows] == rows


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "READ_ROWS", 3)
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i) for i in range(10)]}), tmp_path / "rows.parquet")
    places = [place for place, _ in open_table(tmp_path / "rows.parquet", "parquet").rows]
    assert places == [f"row {i}" for i in range(1, 11)]


def test_a_folder_of_several_splits_names_them(tmp_path):
    DatasetDict({name: Dataset.from_list(ROWS) for name in ("train", "test")}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"has several splits.*both/train, .*both/test"):
        open_table(tmp_path / "both", "saved")
    assert len(list(open_table(tmp_path / "both" / "train", "saved").rows)) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
        ("rows.csv", b"a,b\n\xff\xfe,1\n", "line 2: byte 0xff is not UTF-8 text"),
        ("rows.csv", b'a,b\n"open,1\n', "cannot be read as csv"),
        ("rows.jsonl", b"\xff\xfe{}\n", "begins as UTF-16, but is not UTF-16 here"),
        ("rows.jsonl", b"\n \n", "no rows"),
        ("rows.json", b'[{"text": "a"}', "not JSON"),
        ("rows.json", b'[{"text": "a"}] x', "not JSON"),
        ("rows.json", b'["a", "b"]', "row 1: expected an object, got text"),
        ("rows.json", b'[{"text": ' + b"[" * 100_000, "nested more than 64 levels"),
        ("rows.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
        (
            "notes.txt",
            b"Once upon a time\n",
            'plain text. Convert it to rows: a .jsonl file with a line {"text": "..."}',
        ),
    ],
)
def test_a_file_that_is_broken_is_one_clear_error(write, name, content, said):
    path = write(content, name)
    with pytest.raises(DataError) as caught:
        list(open_table(path, file_kind(path)).rows)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_rows_in_a_file_called_txt_are_still_rows(write):
    assert file_kind(write(b'{"text": "a"}\n', "rows.txt")) == "jsonl"
    assert file_kind(write(b'[{"text": "a"}]', "rows.md")) == "json"


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(tables, "ROW_BYTES", 20)
    with pytest.raises(DataError, match="line 2 is longer than 20 bytes"):
        list(open_table(write('{"text": "a"}\n{"text": "a very long one"}\n', "rows.jsonl"), "jsonl").rows)


def test_a_folder_that_datasets_did_not_save_is_one_clear_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be read as a folder saved by `datasets`"):
        open_table(tmp_path / "folder", "saved")
