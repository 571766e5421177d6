"""Rows as token ids: the tokenizer's own template, labels by position, and a stop token at the end of every row."""

import pytest

from qlora_lite.data.squad import QuestionRow
from qlora_lite.data.template import (
    encode_prompt,
    encode_row,
    prompt_text,
    read_answer_format,
    stop_token_id,
    tokenizer_identity,
)
from qlora_lite.errors import ModelError
from tests.data.conftest import CONTEXT
from tests.data.tiny_tokenizer import CHATML, make_tokenizer

ROW = QuestionRow("a", CONTEXT, "Which town?", ("Cairo", "Luxor"))


def labels(tokenizer, encoded):
    return tokenizer.decode(encoded.input_ids[encoded.label_start :])


def test_the_prompt_is_what_the_benchmark_uses():
    assert prompt_text("Q?", "C") == "Context: C\n\nQuestion: Q?\nAnswer with a short span from the context."
    assert prompt_text("Q?", None) == "Question: Q?\nAnswer with a short span from the context."


def test_prompt_and_labels_are_the_template_rendering_cut_after_the_stop_token(tokenizer):
    encoded = encode_row(tokenizer, ROW, no_answer_text="unanswerable")
    messages = [
        {"role": "user", "content": prompt_text(ROW.question, CONTEXT)},
        {"role": "assistant", "content": "Cairo"},
    ]
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) + "\n" == full
    assert labels(tokenizer, encoded) == "Cairo<|im_end|>"
    assert encoded.input_ids[-1] == stop_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.num_label_tokens == len(encoded.input_ids) - encoded.label_start


@pytest.mark.parametrize("chat_template", [CHATML, None])
@pytest.mark.parametrize("context", [CONTEXT, "", None, "Ünïcödé 🐪 <|im_end|>"])
def test_generation_sees_exactly_the_training_prefix(chat_template, context):
    tokenizer = make_tokenizer(chat_template)
    prompt_ids = encode_prompt(tokenizer, ROW.question, context)
    if context is not None:
        encoded = encode_row(tokenizer, QuestionRow("a", context, ROW.question, ("x",)), no_answer_text="-")
        assert encoded.input_ids[: encoded.label_start] == prompt_ids
    assert prompt_ids


def test_an_unanswerable_row_is_trained_on_the_no_answer_text(tokenizer):
    encoded = encode_row(tokenizer, QuestionRow("a", CONTEXT, "Who?", ()), no_answer_text="no idea")
    assert labels(tokenizer, encoded) == "no idea<|im_end|>"


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = make_tokenizer(None)
    encoded = encode_row(tokenizer, ROW, no_answer_text="-")
    assert tokenizer.decode(encoded.input_ids) == prompt_text(ROW.question, CONTEXT) + "\nCairo<|im_end|>"
    assert labels(tokenizer, encoded) == "Cairo<|im_end|>"


def test_an_answer_that_spells_a_stop_token_has_only_one(tokenizer):
    row = QuestionRow("a", "<|im_end|> b", "Q?", ("<|im_end|> b",))
    encoded = encode_row(tokenizer, row, no_answer_text="-")
    assert encoded.input_ids[encoded.label_start :].count(stop_token_id(tokenizer)) == 1
    assert labels(tokenizer, encoded) == "<|im_end|> b<|im_end|>"


TEMPLATES = {
    # Gemma: another name for the assistant, text trimmed. The stop token is the template's, not the tokenizer's.
    "<|im_start|>{{ messages[0]['content'] | trim }}<|endoftext|>{% if add_generation_prompt %}model\n{% endif %}"
    "{% if messages | length > 1 %}model\n{{ messages[1]['content'] | trim }}<|endoftext|>\n{% endif %}": (
        "",
        "",
        "<|endoftext|>",
    ),
    # Llama 2: a space on both sides of the answer.
    "[INST] {{ messages[0]['content'] }} [/INST]"
    "{% if messages | length > 1 %} {{ messages[1]['content'] }} {{ eos_token }}{% endif %}": ("", " ", "<|im_end|>"),
    # An empty thinking block that the generation prompt leaves out.
    "Q {{ messages[0]['content'] }}\nA{% if messages | length > 1 %}<think>\n\n</think>\n\n{{ messages[1]['content'] }}"
    "{{ eos_token }}{% endif %}": ("<think>\n\n</think>\n\n", "", "<|im_end|>"),
    # A generation prompt that the finished conversation does not continue.
    "Q {{ messages[0]['content'] }}\n{% if add_generation_prompt %}<think>\n{% else %}{{ messages[1]['content'] }}"
    "{{ eos_token }}{% endif %}": ("", "", "<|im_end|>"),
    # No stop token of its own.
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}": ("", "", "<|im_end|>"),
}


@pytest.mark.parametrize("chat_template", TEMPLATES)
def test_what_surrounds_the_answer_is_read_from_any_template(chat_template):
    before, space, stop = TEMPLATES[chat_template]
    tokenizer = make_tokenizer(chat_template)
    found = read_answer_format(tokenizer)
    assert (found.before, found.space, tokenizer.convert_ids_to_tokens(found.stop_token_id)) == (before, space, stop)
    encoded = encode_row(tokenizer, ROW, no_answer_text="-")
    assert tokenizer.decode(encoded.input_ids[: encoded.label_start]).endswith(before)
    assert labels(tokenizer, encoded) == space + "Cairo" + found.after + stop
    assert encoded.input_ids[: encoded.label_start] == encode_prompt(tokenizer, ROW.question, CONTEXT)


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for m in messages %}", "cannot render"),
        ("{{ messages[7]['content'] }}", "cannot render"),
        ("{{ messages[0]['content'] }}", "leaves the assistant's answer out"),
    ],
)
def test_an_unusable_template_is_one_clear_error(chat_template, said):
    with pytest.raises(ModelError, match=said):
        encode_row(make_tokenizer(chat_template), ROW, no_answer_text="-")


def test_a_tokenizer_without_a_stop_token_is_one_clear_error():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r'Set "eos_token"'):
        stop_token_id(tokenizer)


def test_the_identity_follows_the_template_but_not_padding_or_truncation():
    tokenizer = make_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(make_tokenizer())
    tokenizer.chat_template = CHATML.replace("helpful", "brief")
    assert tokenizer_identity(tokenizer) != before
