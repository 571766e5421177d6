"""Identical rows, and held-out rows that are trained on, are counted and said; a weight and a text's pieces repeat nothing."""

import json

from qlora_lite.data.repeats import find_repeats
from tests.data.tiny_tokenizer import make_tokenizer
from tests.reading import load_examples
from tests.tiny_run import run_cli, write_recipe


def load(tmp_path, name, rows, *, weight=1.0, max_seq_length=None):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(
        [(path, weight)], make_tokenizer(), num_rows=None, no_answer_text="none", max_seq_length=max_seq_length,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip


def pair(i):
    return {"prompt": f"say {i}", "completion": str(i)}


def test_identical_rows_are_counted_whatever_their_ids_and_white_space(tmp_path):
    rows = [{"id": f"row-{i}", **pair(0)} for i in range(40)] + [pair(1), {"prompt": " say 1 ", "completion": "1\n"}]
    found = find_repeats(load(tmp_path, "a.jsonl", rows), None)
    assert (found.num_rows, found.num_repeated, found.most_times) == (42, 40, 40)
    assert found.sentences[0].startswith(
        "data.train: 40 of 42 rows are identical to an earlier one; one occurs 40 times"
    )


def test_rows_that_overlap_under_another_name_and_in_another_format_are_found(tmp_path):
    train = load(tmp_path, "a.jsonl", [pair(i) for i in range(6)])
    turns = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]} for i in (4, 5, 6)
    ]  # fmt: skip
    found = find_repeats(train, load(tmp_path, "b.jsonl", turns))
    assert (found.num_held_out, found.num_in_training, found.num_repeated) == (3, 2, 0)
    assert found.sentences[0].startswith("data.eval: 2 of 3 held-out rows are also training rows")


def test_a_weight_and_the_pieces_of_a_text_repeat_nothing(tmp_path):
    assert find_repeats(load(tmp_path, "a.jsonl", [pair(i) for i in range(6)], weight=3), None).sentences == []
    text = load(tmp_path, "t.jsonl", [{"text": "one two three " * 50}], max_seq_length=16)
    assert len(text) > 5 and find_repeats(text, None).sentences == []


def test_check_and_train_warn_where_the_held_out_rows_are_the_training_rows(tmp_path):
    recipe = write_recipe(tmp_path)
    data = ["--set", "data.eval=train.json", "--set", "train.max_steps=1"]
    checked = run_cli("check", recipe, *data, "--json")
    assert checked.json["eval"]["num_in_training"] == checked.json["eval"]["num_rows"] == 4
    said = "warning: data.eval: all 4 held-out rows are also training rows"
    trained = run_cli("train", recipe, "--run-dir", tmp_path / "run", *data, "--set", "train.eval_every_steps=null")
    assert said in checked.stderr and said in trained.stderr, trained.stderr
    assert "also training rows" not in run_cli("check", recipe).stderr
