"""What check says agrees with what load_examples does."""

import json

import pytest

from qlora_lite.data.inspect import TEXT_TOKENS, propose_max_seq_length, render_tokens
from qlora_lite.data.template import Encoded
from tests.data.conftest import CONTEXT, question, squad
from tests.data.families import FAMILIES
from tests.reading import inspect_rows, load_examples

QUESTIONS = [
    question("a", "Which river?", "The Nile"),
    question("b", "Which town?", "Luxor"),
    question("c", "Who?"),
    question("d", "Which " + "very " * 80 + "river?", "The Nile"),
]


def inspect(path, tokenizer, **changes):
    settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": None}
    return inspect_rows(path, tokenizer, **settings | changes)


def test_the_truncation_table_says_what_loading_does(write, tokenizer, tmp_path):
    path = write(squad(*QUESTIONS))
    for max_seq_length in (90, 128, 140, 256, 512):
        report = inspect(path, tokenizer, max_seq_length=max_seq_length)
        line = next(line for line in report.truncation if line.max_seq_length == max_seq_length)
        examples = load_examples(
            path,
            tokenizer,
            num_rows=None,
            no_answer_text="none",
            max_seq_length=max_seq_length,
            cache_dir=tmp_path / "c",
        )
        assert (line.num_cut, line.num_dropped) == (examples.num_cut, examples.num_dropped)
        assert line.num_whole + line.num_cut + line.num_dropped == report.num_rows == 4
        assert report.num_dropped == examples.num_dropped


def test_the_report_proposes_a_length_that_holds_every_row(write, tokenizer):
    report = inspect(write(squad(*QUESTIONS)), tokenizer)
    assert report.proposed_max_seq_length % 64 == 0
    assert report.max_tokens <= report.proposed_max_seq_length < report.max_tokens + 64
    assert f"the longest has {report.max_tokens} tokens" in report.reason
    assert {128, 256, 512, 1024, 2048, 4096, report.max_tokens} <= {line.max_seq_length for line in report.truncation}
    assert (report.format, report.stop_token, report.num_dropped, report.num_bad) == (
        "SQuAD v2.0 JSON",
        "<|im_end|>",
        0,
        0,
    )


TALK = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
OTHER_FORMATS = {
    "chat": [{"messages": TALK}, {"messages": TALK * 4}],
    "alpaca": [{"instruction": "Add", "input": "1 2 " * n, "output": "3"} for n in (1, 60)],
    "text": [{"text": "word " * n} for n in (5, 60)],
}


@pytest.mark.parametrize("format", OTHER_FORMATS)
def test_the_truncation_table_says_what_loading_does_for_every_format(write, tokenizer, tmp_path, format):
    path = write("".join(json.dumps(row) + "\n" for row in OTHER_FORMATS[format]), "rows.jsonl")
    for max_seq_length in (100, 128, 512):
        report = inspect(path, tokenizer, max_seq_length=max_seq_length)
        assert (report.format, report.format_reason.split(":")[0]) == (format, "rows.jsonl")
        line = next(line for line in report.truncation if line.max_seq_length == max_seq_length)
        settings = {"num_rows": None, "no_answer_text": "none", "cache_dir": tmp_path / "c"}
        examples = load_examples(path, tokenizer, max_seq_length=max_seq_length, **settings)
        assert (line.num_cut, line.num_dropped) == (examples.num_cut, examples.num_dropped)
        assert line.num_whole + line.num_cut + line.num_dropped == report.num_rows == 2
    assert (line.num_whole, line.num_dropped) == (2, 0)


def test_every_turn_of_a_conversation_is_marked_where_it_is_trained(write, tokenizer):
    report = inspect(write(json.dumps({"messages": TALK}), "rows.jsonl"), tokenizer)
    (row,) = report.rows
    assert "".join(text for text, trained in row.tokens if trained) == "turn 1<|im_end|>turn 3<|im_end|>"


def test_long_texts_get_a_proposal_that_cuts_them_in_pieces():
    assert propose_max_seq_length([100, 5000], limit=8192, is_text=True)[0] == TEXT_TOKENS
    assert propose_max_seq_length([100, 5000], limit=512, is_text=True)[0] == 512
    assert propose_max_seq_length([100, 500], is_text=True) == propose_max_seq_length([100, 500])


def test_what_the_template_makes_of_rows_is_said(write):
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    path = write(json.dumps({"messages": talk}), "rows.jsonl")
    said = {
        name: inspect(path, FAMILIES[name].tokenizer()).notes for name in ("llama3", "mistral_v1", "mistral_v3", "qwen")
    }
    assert said["llama3"] == ()
    assert "no system role" in said["mistral_v1"][0] and "rewrites earlier turns" in said["qwen"][0]
    assert len(said["mistral_v3"]) == 1 and "rewrites earlier turns" in said["mistral_v3"][0]


def test_columns_that_are_not_read_are_said_by_check_and_train(write, tokenizer, tmp_path):
    path = write(json.dumps({"id": "a", "messages": TALK, "source": "x", "score": 1}), "rows.jsonl")
    examples = load_examples(
        path, tokenizer, num_rows=None, no_answer_text="none", max_seq_length=None, cache_dir=tmp_path / "c"
    )
    assert inspect(path, tokenizer).notes == ("rows.jsonl: unused columns: source, score",)
    assert examples.counts.notes == inspect(path, tokenizer).notes


def test_three_rows_are_shown_with_answer_and_stop_token_marked(write, tokenizer):
    report = inspect(write(squad(*QUESTIONS)), tokenizer)
    assert [row.id for row in report.rows] == ["a", "b", "c"]
    for row, answer in zip(report.rows, ("The Nile", "Luxor", "none"), strict=True):
        assert "".join(text for text, trained in row.tokens if trained) == answer + "<|im_end|>"
        assert f"Context: {CONTEXT}\n" in "".join(text for text, _ in row.tokens)
        assert row.num_tokens == len(row.tokens)


def test_a_row_that_loses_context_and_an_unanswerable_one_are_among_those_shown(write, tokenizer):
    rows = [question(f"r{i}", "Which river?", "The Nile") for i in range(5)] + QUESTIONS[2:]
    report = inspect(write(squad(*rows)), tokenizer, max_seq_length=4096)
    assert [row.id for row in report.rows] == ["r0", "r1", "c"]
    shown = inspect(write(squad(*rows)), tokenizer, max_seq_length=report.max_tokens - 1).rows
    assert [(row.id, row.was_cut) for row in shown] == [("r0", False), ("c", False), ("d", True)]


def test_characters_of_several_tokens_are_shown_once(tokenizer):
    ids = tokenizer("é🐪x", add_special_tokens=False)["input_ids"]
    tokens = render_tokens(tokenizer, Encoded(ids, ((2, len(ids)),)))
    assert "".join(text for text, _ in tokens) == "é🐪x"
    assert len(tokens) == len(ids)


@pytest.mark.parametrize(
    ("lengths", "limit", "proposed", "said"),
    [
        ([1], None, 64, "longest has 1 tokens"),
        ([64, 30], None, 64, "longest has 64"),
        ([65], None, 128, "longest has 65"),
        ([100] * 999 + [201], None, 128, "1 outliers of up to 201"),
        ([100] * 999 + [200], None, 256, "longest has 200"),
        ([100] * 99 + [900], None, 960, "longest has 900"),
        ([3000], 2048, 2048, "context window is 2048"),
    ],
)
def test_the_proposed_length_and_its_reason(lengths, limit, proposed, said):
    found, reason = propose_max_seq_length(lengths, limit=limit)
    assert found == proposed
    assert said in reason


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"context": "C " * n, "question": "Q?", "answers": ["C"]} for n in (*[1] * 399, 2000)], "lose context"),
        ([{"prompt": "P " * n, "completion": "C"} for n in (*[1] * 399, 2000)], "are left out"),
        ([{"text": "T " * n} for n in (*[1] * 399, 400)], "are cut in pieces"),
    ],
    ids=["squad", "prompt_completion", "text"],
)
def test_what_becomes_of_outliers_is_said_for_the_format(write, tokenizer, rows, said):
    report = inspect(write("\n".join(json.dumps(row) for row in rows), "rows.jsonl"), tokenizer)
    assert report.reason.endswith(f" tokens {said}") and "1 outliers" in report.reason


def test_no_rows_no_proposal():
    with pytest.raises(ValueError, match="no rows"):
        propose_max_seq_length([])
