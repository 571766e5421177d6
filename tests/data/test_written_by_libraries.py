"""Rows that csv, json, pandas and `datasets` write come back equal, in any encoding, delimiter and order; `datasets`' own reader agrees."""

import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, Features, Value, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_lite.data.read import read_mix

# Text as people have it: any script, quotes, delimiters, line breaks inside; it is not blank, and csv does not tell "\r" from "\n".
TEXTS = st.text(
    st.one_of(
        st.sampled_from(list("\"',;|\t\n\\/{}[]: é€🐪\u2028\x85")),
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"),
    ),
    min_size=1,
    max_size=30,
).filter(lambda text: text.strip())
NAMES = ("question", "answer", "id", "note")
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXTS)), min_size=1, max_size=5)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEW = settings(SETTINGS, max_examples=12)  # those where `datasets` writes


def read(data, name):
    """-> ((id, question, answer) per row, notes) of a file with these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        mix = read_mix(path)
        assert mix.num_bad == 0, mix.bad
        return [(row.id, *(message["content"] for message in row.messages)) for row in mix], mix.notes


def wanted(rows):
    return [(row["id"], row["question"], row["answer"]) for row in rows]


@SETTINGS
@given(rows=ROWS, order=st.permutations(NAMES), encoding=ENCODINGS, is_packed=st.booleans(), seed=st.booleans())
def test_jsonl_and_json_in_any_encoding_and_order_of_keys_come_back_equal(rows, order, encoding, is_packed, seed):
    orders = [order if i % 2 else order[::-1] for i in range(len(rows))]
    objects = [{name: row[name] for name in names} for row, names in zip(rows, orders, strict=True)]
    documents = {
        "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=seed) for row in objects),
        "rows.json": json.dumps(objects, ensure_ascii=seed, indent=1 if seed else None),
        "wrapped.json": json.dumps({"data": objects}, ensure_ascii=seed),
    }
    for name, text in documents.items():
        data = text.encode(encoding)
        found, notes = read(gzip.compress(data) if is_packed else data, name)
        assert found == wanted(rows)
        assert any("byte order mark" in note for note in notes) == (encoding in ("utf-16", "utf-32"))


@SETTINGS
@given(
    rows=ROWS,
    order=st.permutations(NAMES),
    encoding=ENCODINGS,
    delimiter=st.sampled_from(",;\t|"),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    names_delimiter=st.booleans(),
)
def test_csv_with_any_delimiter_encoding_and_order_of_columns_comes_back_equal(
    rows, order, encoding, delimiter, ending, quoting, names_delimiter
):
    text = io.StringIO()
    text.write(f"sep={delimiter}{ending}" if names_delimiter else "")
    writer = csv.DictWriter(text, order, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    for name in ("rows.csv", "rows.tsv"):
        found, _ = read(text.getvalue().encode(encoding), name)
        assert found == wanted(rows)


@SETTINGS
@given(rows=ROWS, orient=st.sampled_from(["columns", "split", "index", "table", "records"]), seed=st.booleans())
def test_every_orientation_that_pandas_writes_comes_back_equal(rows, orient, seed):
    text = pandas.DataFrame(rows).to_json(orient=orient, force_ascii=seed)
    assert read(text.encode(), "rows.json")[0] == wanted(rows)


@NEW
@given(rows=ROWS, encoding=st.sampled_from(["utf-8", "utf-16"]))
def test_what_datasets_writes_comes_back_equal(rows, encoding):
    dataset = Dataset.from_list(rows)
    for name, write in (
        ("rows.csv", lambda path: dataset.to_csv(path, encoding=encoding)),
        ("rows.jsonl", dataset.to_json),
        ("rows.json", lambda path: dataset.to_json(path, lines=False)),
        ("rows.parquet", dataset.to_parquet),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(os.path.join(folder, name))
            data = Path(folder, name).read_bytes()
        assert read(data, name)[0] == wanted(rows), name


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_the_reader_of_datasets_gives_the_same_rows(kind, tmp_path):
    texts = ['a, "b"\nc', "é € 🐪", "  spaces ", "a\u2028b\x85", "007", "null", "1e5", "NA", "{}"]
    rows = [{"id": f"r{i}", "question": text, "answer": texts[-i - 1], "note": f"n{i}"} for i, text in enumerate(texts)]
    path = str(tmp_path / f"rows.{kind}")
    getattr(Dataset.from_list(rows), f"to_{kind}")(path)
    strings = Features(dict.fromkeys(NAMES, Value("string")))
    options = {"keep_default_na": False, "features": strings} if kind == "csv" else {}
    theirs = load_dataset(kind, data_files=path, split="train", cache_dir=str(tmp_path / "cache"), **options)
    ours, _ = read(Path(path).read_bytes(), f"rows.{kind}")
    assert ours == wanted(theirs) == wanted(rows)
