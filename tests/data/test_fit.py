"""What fits: texts in pieces that lose nothing, conversations whole or not at all, and what evaluation asks about each."""

from itertools import pairwise

import pytest

from qlora_lite.data.fit import TemplateNotes, fit_row, least_tokens
from qlora_lite.data.rows import Conversation, Document, QuestionRow
from qlora_lite.data.template import ChatTemplate
from tests.data.conftest import CONTEXT
from tests.data.families import FAMILIES

TEXT = "The Nile flows through Egypt, past Cairo and Luxor. " * 6
TALK = Conversation(
    "talk",
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which river?"},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "Which town?"},
        {"role": "assistant", "content": " Luxor \n"},
    ),
)


def fit(name, row, max_seq_length=None):
    template = ChatTemplate(FAMILIES[name].tokenizer())
    return template, *fit_row(template, row, no_answer_text="none", max_seq_length=max_seq_length)


@pytest.mark.parametrize("max_seq_length", [2, 3, 7, 64, 1000])
def test_every_token_of_a_text_is_trained_exactly_once_from_the_token_before_it(max_seq_length):
    template, pieces, was_cut = fit("llama3", Document("text", TEXT), max_seq_length)
    whole = template.document(TEXT)[0]
    pairs = [
        (piece.encoded.input_ids[p], piece.encoded.input_ids[p + 1])
        for piece in pieces
        for p in piece.encoded.predictors
    ]
    assert pairs == list(pairwise(whole))
    assert max(len(piece.encoded.input_ids) for piece in pieces) <= max_seq_length
    assert was_cut == (len(pieces) > 1) == (len(whole) > max_seq_length)


def test_only_the_last_piece_of_a_text_ends_in_the_end_of_text():
    template, pieces, _ = fit("gemma", Document("text", TEXT), 64)
    assert template.tokenizer.decode([template.end_token_id]) == "<eos>"
    assert [piece.encoded.input_ids.count(template.end_token_id) for piece in pieces] == [0] * (len(pieces) - 1) + [1]
    assert pieces[-1].encoded.input_ids[-1] == template.end_token_id
    assert all(piece.answers is None for piece in pieces), "there is nothing to compare"


def test_a_special_token_that_a_text_spells_is_that_token_as_in_a_conversation_that_was_rendered_before():
    template, (piece,), _ = fit("llama3", Document("text", "<|eot_id|> is how a turn ends"))
    assert piece.encoded.input_ids.count(template.stop_token_id) == 1
    assert template.tokenizer.decode(piece.encoded.input_ids) == "<|eot_id|> is how a turn ends<|end_of_text|>"


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_a_conversation_is_whole_or_dropped(name):
    _, examples, _ = fit(name, TALK)
    longest = max(len(example.encoded.input_ids) for example in examples)
    assert fit(name, TALK, longest)[1:] == (examples, False)
    assert fit(name, TALK, longest - 1)[1:] == ([], False)


def test_the_last_answer_of_each_example_is_asked_behind_what_inference_sees():
    template, (example,), _ = fit("llama3", TALK)
    assert (example.id, example.question, example.answers) == ("talk", "Which town?", ("Luxor",))
    assert example.prompt_ids == template.prompt_ids(TALK.messages[:4])
    template, examples, _ = fit("qwen", TALK)
    assert [example.answers for example in examples] == [("The Nile.",), ("Luxor",)]
    assert [example.prompt_ids for example in examples] == [template.prompt_ids(TALK.messages[:i]) for i in (2, 4)]


def test_a_tool_call_is_trained_and_not_compared_as_an_answer():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "towns", "arguments": {}}}]}
    _, (example,), _ = fit("llama3", Conversation("call", (TALK.messages[1], call)))
    assert example.answers is None and example.encoded.num_label_tokens > 2
    tool = {"role": "tool", "content": "Luxor"}
    _, (example,), _ = fit("llama3", Conversation("both", (TALK.messages[1], call, tool, TALK.messages[2])))
    assert example.answers == ("The Nile.",)


def test_a_shortened_question_is_asked_about_its_whole_context():
    row = QuestionRow("a", CONTEXT * 5, "Which town?", ("Luxor",))
    _, (whole,), _ = fit("chatml", row)
    _, (cut,), was_cut = fit("chatml", row, len(whole.encoded.input_ids) - 100)
    assert was_cut and len(cut.encoded.input_ids) < len(whole.encoded.input_ids)
    assert cut.prompt_ids == whole.prompt_ids != cut.encoded.input_ids[: cut.encoded.spans[0][0]]


@pytest.mark.parametrize("row", [TALK, Document("text", TEXT), QuestionRow("a", CONTEXT, "Which town?", ("Luxor",))])
@pytest.mark.parametrize("name", ["chatml", "qwen", "gemma"])
def test_the_fewest_tokens_of_a_row_are_those_at_which_it_is_not_dropped(name, row):
    template, examples, _ = fit(name, row)
    whole = max(len(example.encoded.input_ids) for example in examples)
    least = least_tokens(template, row, whole, no_answer_text="none")
    assert fit(name, row, least)[1]
    assert not fit(name, row, least - 1)[1]


def test_what_the_template_made_necessary_is_counted_and_said():
    said = {}
    for name in ("chatml", "gemma", "qwen"):
        template, examples, _ = fit(name, TALK)
        notes = TemplateNotes()
        for row in (TALK, TALK, Document("text", TEXT)):
            notes.count(template, row, examples)
        said[name] = notes.sentences
    assert said["chatml"] == ()
    assert len(said["gemma"]) == len(said["qwen"]) == 1
    assert "no system role" in said["gemma"][0] and "of 2 conversations" in said["gemma"][0]
    assert "rewrites earlier turns: 2 conversations" in said["qwen"][0]
