"""Tokenized rows on disk: written once, re-used, never damaged, never without labels."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qlora_lite.data import examples as module
from qlora_lite.data.fit import fit_row
from qlora_lite.data.prompts import question_prompt
from qlora_lite.data.rows import QuestionRow
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import DataError
from tests.data.conftest import CONTEXT, question, squad
from tests.data.families import FAMILIES
from tests.reading import inspect_rows, load_examples

QUESTIONS = [
    question("a", "Which river?", "The Nile", "Nile"),
    question("b", "Who?"),
    question("c", "Which town?", "Luxor"),
]
LONG = "Sand lies all around. " * 40 + "The well is called Bir Tawil." + " Nobody lives there now." * 40


def fit_one(tokenizer, row, max_seq_length=None):
    """(its one example's encoding, whether it was cut), or None."""
    examples, was_cut = fit_row(ChatTemplate(tokenizer), row, no_answer_text="none", max_seq_length=max_seq_length)
    return (examples[0].encoded, was_cut) if examples else None


def labels(encoded):
    return [encoded.input_ids[position + 1] for position in encoded.predictors]


@pytest.fixture
def load(tokenizer, tmp_path):
    def load_with(path, **changes):
        settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": None, "cache_dir": tmp_path / "cache"}
        return load_examples(path, tokenizer, **settings | changes)

    return load_with


def test_examples_hold_what_the_template_makes_and_the_row_as_it_was(load, write, tokenizer):
    examples = load(write(squad(*QUESTIONS)))
    assert len(examples) == 3
    golds = (("The Nile", "Nile"), (), ("Luxor",))
    for index, (asked, answers) in enumerate(zip(QUESTIONS, golds, strict=True)):
        row = QuestionRow(asked["id"], CONTEXT, asked["question"], answers)
        assert (examples.encoded(index), False) == fit_one(tokenizer, row)
        found = examples.row(index)
        assert (found.id, found.question, found.answers) == (row.id, row.question, row.answers)
        prompt, _ = question_prompt(ChatTemplate(tokenizer), row.question, CONTEXT, format="squad")
        assert examples.prompt_ids(index) == prompt
    assert examples.lengths.tolist() == [len(examples.encoded(i).input_ids) for i in range(3)]
    assert examples.num_label_tokens.tolist() == [examples.encoded(i).num_label_tokens for i in range(3)]
    assert examples.lengths.dtype == np.int64
    assert (examples.num_dropped, examples.num_cut, examples.max_seq_length) == (0, 0, None)
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            examples.encoded(outside)


def test_num_rows_takes_the_first_usable_rows(load, write):
    examples = load(write(squad(*QUESTIONS)), num_rows=2)
    assert [examples.row(i).id for i in range(len(examples))] == ["a", "b"]


def test_a_second_call_maps_what_the_first_wrote(load, write, monkeypatch):
    path = write(squad(*QUESTIONS))
    first = load(path)
    monkeypatch.setattr(module, "read_mix", lambda *a, **k: pytest.fail("read again"))
    second = load(path)
    assert second.fingerprint == first.fingerprint
    assert second.encoded(2) == first.encoded(2)
    assert second.counts == first.counts


def test_whatever_changes_the_rows_changes_the_fingerprint(load, write, monkeypatch):
    path = write(squad(*QUESTIONS))
    seen = {
        load(path, **change).fingerprint
        for change in ({}, {"num_rows": 2}, {"no_answer_text": "x"}, {"max_seq_length": 150}, {"format": "squad"})
    }
    seen.add(load(write(squad(*QUESTIONS[:2]), "other.json")).fingerprint)
    monkeypatch.setattr(module, "CODE_VERSION", 0)
    seen.add(load(path).fingerprint)
    assert len(seen) == 7


def test_weights_names_and_kind_of_the_files_change_the_fingerprint(load, write):
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(4))
    one, two = write(rows, "one.jsonl"), write(rows, "two.jsonl")
    sources = (one, [(one, 2.0)], [(one, 0.5)], [(one, 1.0), (one, 1.0)], [(one, 1.0), (two, 1.0)])
    assert len({load(source).fingerprint for source in sources}) == 5
    assert load(two).fingerprint == load(one).fingerprint == load([(one, 1.0)]).fingerprint
    assert [len(load(source)) for source in sources] == [4, 8, 2, 8, 8]


def test_texts_conversations_and_questions_come_back_as_they_were_written(load, write, tokenizer):
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    files = [
        (write("".join(json.dumps({"text": "word " * 100}) + "\n"), "text.jsonl"), 1.0),
        (write(json.dumps([{"messages": talk}]), "chat.json"), 1.0),
        (write(squad(*QUESTIONS)), 1.0),
    ]
    examples = load(files, max_seq_length=200)
    template, position = ChatTemplate(tokenizer), 0
    for row in module.read_mix(files):
        for example in fit_row(template, row, no_answer_text="none", max_seq_length=200)[0]:
            assert examples.encoded(position) == example.encoded
            assert examples.prompt_ids(position) == example.prompt_ids
            assert examples.row(position) == example
            position += 1
    assert position == len(examples) > 5
    assert [len(examples.encoded(i).spans) for i in range(len(examples))].count(2) == 1, "the conversation"
    assert examples.counts.num_read == 5 and not examples.is_text
    assert load(files[0][0]).is_text


@pytest.mark.parametrize("damage", ["flip", "cut", "note", "gone"])
def test_a_damaged_cache_is_written_again(load, write, damage):
    path = write(squad(*QUESTIONS))
    first = load(path)
    wanted = [first.encoded(i) for i in range(3)]
    rows = next((path.parent / "cache").glob("*/rows.arrow"))
    content = bytearray(rows.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(content[:-10])
    elif damage == "note":
        (rows.parent / "note.json").write_text("[]")
    else:
        rows.unlink()
    again = load(path)
    assert [again.encoded(i) for i in range(3)] == wanted


def test_a_failed_write_leaves_nothing_behind(load, write, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(DataError, match="No space left on device"):
        load(write(squad(*QUESTIONS)))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_is_a_file_is_one_clear_error(load, write, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write the tokenized examples"):
        load(write(squad(*QUESTIONS)), cache_dir=tmp_path / "file")


def test_nothing_is_pickled_and_nothing_is_written_elsewhere(write, tmp_path):
    """In a process of its own, with a home folder of its own and pickling to a file forbidden."""
    path = write(squad(*QUESTIONS))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "from tests.data.tiny_tokenizer import make_tokenizer\n"
        "from qlora_lite.data.examples import load_examples\n"
        "import datasets, dill\n"
        "def refuse(*a, **k): raise SystemExit('pickled')\n"
        "dill.dump = dill.dumps = dill.load = dill.loads = pickle.dump = pickle.load = pickle.loads = refuse\n"
        "t = make_tokenizer()\n"
        f"e = load_examples({str(path)!r}, t, max_seq_length=None, cache_dir={str(tmp_path / 'c')!r})\n"
        "assert e.dataset.cache_files[0]['filename'].endswith('rows.arrow'); print(len(e))"
    )
    home = tmp_path / "home"
    home.mkdir()
    root = os.getcwd()
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": root}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "3", "")
    assert list(home.rglob("*")) == []
    assert sorted(p.name for p in (tmp_path / "c").rglob("*") if p.is_file()) == ["note.json", "rows.arrow"]


def test_rows_that_are_not_used_are_accounted_for_with_their_names(load, write):
    long_question = question("long", "Which " + "very " * 100 + "river?", "The Nile")
    long_context = {"context": CONTEXT * 5, "qas": [question("deep", "Which town?", "Luxor", context=CONTEXT * 5)]}
    document = squad(long_question, *QUESTIONS, question("bad", "", "The Nile"), question("last", "Which?", "The Nile"))
    document["data"][0]["paragraphs"].insert(0, long_context)
    path = write(document)
    for _ in range(2):  # also from the cache
        examples = load(path, max_seq_length=180, num_rows=5, max_bad_share=0.5)
        assert examples.account("training rows", limit="data.num_train") == [
            "training rows: the first 5 of 6 rows; data.num_train: null takes all",
            'training rows: 1 bad rows left out: id "bad": question: empty',
            "training rows: 1 of 5 rows left out, longer than data.max_seq_length (180): long",
            "training rows: 1 of 5 rows cut (shorter context, or text in pieces) to data.max_seq_length (180): deep",
        ]
    assert load(path, max_bad_share=0.5, num_rows=6).account("rows", limit="x") == [
        'rows: 1 bad rows left out: id "bad": question: empty'
    ]


def test_rows_of_which_each_ends_in_a_tool_call_are_no_plain_text(write, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "towns", "arguments": {}}}]}
    path = write(json.dumps({"messages": [TURN[0], call]}), "rows.jsonl")
    settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": None, "cache_dir": tmp_path / "c"}
    examples = load_examples(path, FAMILIES["llama3"].tokenizer(), **settings)
    assert examples.row(0).answers is None and not examples.is_text


def test_of_many_rows_that_are_not_used_the_first_few_are_named(load, write):
    path = write("\n".join(json.dumps({"text": "word " * 100}) for _ in range(5)), "rows.jsonl")
    assert load(path, max_seq_length=50).account("rows", limit="x") == [
        "rows: 5 of 5 rows cut in pieces of data.max_seq_length (50): line 1; line 2; line 3; and 2 more"
    ]
    assert load(write(squad(*QUESTIONS)), max_seq_length=None).account("rows", limit="x") == []


# --- rows that the template cannot render

TURN = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The Nile."}]


def chats(write, num_good, num_bad):
    """Bad ones first: two user messages in a row, which Gemma's template refuses."""
    rows = [{"id": f"bad{i}", "messages": [TURN[0], *TURN]} for i in range(num_bad)]
    rows += [{"id": f"good{i}", "messages": TURN} for i in range(num_good)]
    return write("\n".join(json.dumps(row) for row in rows), "rows.jsonl")


def test_a_row_that_the_template_cannot_render_is_a_bad_row_and_the_others_are_trained(write, tmp_path):
    tokenizer, path = FAMILIES["gemma"].tokenizer(), chats(write, 99, 1)
    settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": None}
    counts = load_examples(path, tokenizer, cache_dir=tmp_path / "c", **settings).counts
    report = inspect_rows(path, tokenizer, **settings)
    for found in (counts, report):
        assert found.num_bad == len(found.bad) == 1
        assert found.bad[0].startswith("row bad0: ") and "roles must alternate" in found.bad[0]
    assert counts.num_read == report.num_rows == 99
    assert [row.id for row in report.rows] == ["good0", "good1", "good2"]


def test_more_rows_that_the_template_cannot_render_than_allowed_are_refused_by_name(write, tmp_path):
    tokenizer, path = FAMILIES["gemma"].tokenizer(), chats(write, 97, 3)
    settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": None}
    for read in (
        lambda: load_examples(path, tokenizer, cache_dir=tmp_path / "c", **settings),
        lambda: inspect_rows(path, tokenizer, **settings),
    ):
        with pytest.raises(
            DataError, match=r"rows\.jsonl: 3 of 100 rows cannot be used \(3\.0%, allowed 2%\)"
        ) as caught:
            read()
        assert [f"row bad{i}: " in str(caught.value) for i in range(3)] == [True] * 3
    assert list((tmp_path / "c").iterdir()) == []


# --- sequences that are too long


def test_a_long_row_loses_context_but_keeps_question_and_answer(tokenizer):
    row = QuestionRow("a", LONG, "What is the well called?", ("Bir Tawil",), LONG.index("Bir Tawil"))
    whole, _ = fit_one(tokenizer, row)
    for max_seq_length in range(150, len(whole.input_ids), 97):
        fitted = fit_one(tokenizer, row, max_seq_length)
        assert fitted is not None
        encoded, was_cut = fitted
        assert was_cut
        assert max_seq_length - 30 < len(encoded.input_ids) <= max_seq_length
        text = tokenizer.decode(encoded.input_ids)
        kept = text.partition("Context: ")[2].partition("\n\nQuestion:")[0]
        assert "Bir Tawil" in kept and kept in LONG
        assert text.endswith("Bir Tawil<|im_end|>") and "What is the well called?" in text
        assert labels(encoded) == labels(whole)
    assert fit_one(tokenizer, row, len(whole.input_ids)) == (whole, False)


def test_the_context_is_cut_at_words_where_the_answer_is_farther_away(tokenizer):
    def kept(answer_start):
        row = QuestionRow("a", context, "Q?", ("answer",), answer_start)
        fitted = fit_one(tokenizer, row, 160)
        return tokenizer.decode(fitted[0].input_ids).partition("Context: ")[2].partition("\n\nQuestion:")[0]

    context = "answer " + "filler " * 200 + "answer"
    assert kept(0).startswith("answer filler") and kept(0).endswith("filler")
    assert kept(len(context) - 6).startswith("filler") and kept(len(context) - 6).endswith("filler answer")


def test_rows_that_cannot_keep_their_answer_are_dropped_and_counted(load, write):
    long_question = question("long", "Which " + "very " * 100 + "river?", "The Nile")
    examples = load(write(squad(*QUESTIONS, long_question)), max_seq_length=170)
    assert (len(examples), examples.num_dropped, examples.counts.dropped) == (3, 1, ("long",))
    assert examples.lengths.max() <= 170
    assert examples.num_label_tokens.min() >= 2


def test_when_every_row_would_lose_its_answer_it_is_refused(load, write):
    for _ in range(2):  # also when the cache already knows
        with pytest.raises(DataError, match=r"all 3 rows .*max_seq_length=20\. Increase data\.max_seq_length"):
            load(write(squad(*QUESTIONS)), max_seq_length=20)


@pytest.mark.parametrize("change", [{"num_rows": 0}, {"max_seq_length": 0}, {"no_answer_text": " "}])
def test_settings_that_make_no_sense_are_refused(load, write, change):
    with pytest.raises(DataError, match=next(iter(change))):
        load(write(squad(*QUESTIONS)), **change)


def test_unicode_contexts_are_cut_anywhere(tokenizer):
    context = "🐪" * 300 + "नील" + "🐫" * 300
    row = QuestionRow("a", context, "Q?", ("नील",), 300)
    encoded, was_cut = fit_one(tokenizer, row, 300)
    assert was_cut and encoded.input_ids[-1] == ChatTemplate(tokenizer).stop_token_id
    assert "🐪नील🐫" in tokenizer.decode(encoded.input_ids)
    json.dumps(tokenizer.decode(encoded.input_ids))
