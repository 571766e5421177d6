"""Inputs like the ones that were once misread; each test states the right reading."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lite.data.repeats import find_repeats
from qlora_lite.data.tables import file_kind, open_table
from qlora_lite.data.template import ChatTemplate, Vocabulary
from qlora_lite.errors import DataError
from tests.data.families import FAMILIES
from tests.reading import inspect_rows, load_examples

GOOD = [{"id": 2**64 - 1 + i, "question": f"q {i}?", "answer": f"a{i}"} for i in range(30)]


def rows_of(path):
    return [values for _, values in open_table(path, file_kind(path)).rows]


def load(path, tokenizer, tmp_path, **settings):
    return load_examples(
        path,
        tokenizer,
        num_rows=None,
        no_answer_text="none",
        max_seq_length=None,
        cache_dir=tmp_path / "cache",
        **settings,
    )


@pytest.mark.parametrize(
    "wrapper", [lambda rows: rows, lambda rows: {"data": rows}, lambda rows: {"n": 1, "rows": rows}]
)
def test_a_whole_number_of_any_size_is_an_id(tmp_path, wrapper):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrapper(GOOD)))
    assert rows_of(path) == GOOD


@pytest.mark.parametrize("first", [{"question": "x"}, {}, None, "text", ["list"]], ids=str)
@pytest.mark.parametrize("key", ["data", "rows"])
def test_the_first_row_of_a_wrapped_list_does_not_decide_alone(tmp_path, first, key):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, key: [first, *GOOD]}))
    rows = rows_of(path)
    assert len(rows) == 1 + len(GOOD) and rows[1:] == GOOD
    assert rows[0] == first or isinstance(rows[0], str)


def test_a_parquet_file_with_a_name_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([word]) for word in "qab"], names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match='several columns are named "answer"'):
        open_table(tmp_path / "rows.parquet", "parquet")


def test_a_text_of_nothing_but_a_stop_token_is_a_bad_row(tmp_path):
    tokenizer = FAMILIES["chatml"].tokenizer()
    stop = tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer).stop_token_id)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (stop, *(f"a {i}" for i in range(100)))))
    examples = load(path, tokenizer, tmp_path)
    assert (len(examples), examples.counts.num_bad, examples.counts.num_dropped) == (100, 1, 0)
    assert "only stop tokens" in examples.counts.bad[0]
    found = inspect_rows(path, tokenizer, num_rows=None, no_answer_text="none", max_seq_length=None)
    assert any("only stop tokens" in str(row) for row in found.bad)


def with_second_stop():
    """A tokenizer whose base also stops at a special token that is neither its eos nor the template's."""
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|second|>"]})
    return tokenizer, Vocabulary(stops=(tokenizer.convert_tokens_to_ids("<|second|>"),))


@pytest.mark.parametrize("tail", ["<|second|>", "<|second|>\n", "<|second|><|second|>"])
def test_what_else_the_base_stops_at_ends_an_answer_once(tmp_path, tail):
    tokenizer, vocabulary = with_second_stop()
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text('{"prompt": "p", "completion": "c"}\n')
    marked.write_text(json.dumps({"prompt": "p", "completion": "c" + tail}) + "\n")
    expected, found = (load(path, tokenizer, tmp_path, vocabulary=vocabulary) for path in (plain, marked))
    assert found.encoded(0) == expected.encoded(0)
    assert any("<|second|>" in note for note in found.counts.notes)


def test_a_held_out_row_that_differs_by_a_stop_token_is_a_training_row(tmp_path):
    tokenizer = FAMILIES["chatml"].tokenizer()
    stop = tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer).stop_token_id)
    for name, tail in (("train", ""), ("eval", stop)):
        lines = [json.dumps({"prompt": f"p{i}", "completion": f"c{i}{tail}"}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    train, held_out = (load(tmp_path / f"{name}.jsonl", tokenizer, tmp_path) for name in ("train", "eval"))
    assert find_repeats(train, held_out).num_in_training == 4


def test_a_prompt_that_is_a_rendered_conversation_is_said(tmp_path):
    tokenizer = FAMILIES["chatml"].tokenizer()
    wrapped = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "yo"}
    for name, row in (("plain", {"prompt": "hi", "completion": "yo"}), ("wrapped", wrapped)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    plain, said = (load(tmp_path / f"{name}.jsonl", tokenizer, tmp_path).counts.notes for name in ("plain", "wrapped"))
    assert plain == () and len(said) == 1
    assert "inside a prompt (<|im_end|>, <|im_start|>)" in said[0] and "the template wraps them again" in said[0]


def test_identical_rows_that_share_an_id_are_repeated(tmp_path):
    tokenizer = FAMILIES["chatml"].tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "same", "prompt": "p", "completion": "c"}\n' * 40)
    found = find_repeats(load([(path, 2.0)], tokenizer, tmp_path), None)
    assert (found.num_rows, found.num_repeated, found.most_times) == (40, 39, 40)


def test_squads_rows_by_column_are_read(tmp_path):
    """What `Dataset.to_dict()` makes of them."""
    answers = [{"text": ["a"], "answer_start": [0]}, {"text": ["b"], "answer_start": [2]}]
    columns = {"id": ["1", "2"], "context": ["a b", "a b"], "question": ["which?", "who?"], "answers": answers}
    (tmp_path / "rows.json").write_text(json.dumps(columns))
    assert rows_of(tmp_path / "rows.json") == [{name: column[i] for name, column in columns.items()} for i in range(2)]


def test_a_missing_prompt_is_called_by_its_columns_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"completion": "x"}\n' + '{"prompt": "p", "completion": "c"}\n' * 100)
    examples = load(path, FAMILIES["chatml"].tokenizer(), tmp_path)
    assert examples.counts.bad == ("line 1: prompt: missing",)
