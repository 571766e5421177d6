"""A tokenizer's template, whatever it is: labels by position, a stop token at the end of every answer, clear errors."""

import pytest

from qlora_lite.data.formats import read_row
from qlora_lite.data.prompts import question_prompt, squad_text
from qlora_lite.data.rows import Conversation
from qlora_lite.data.template import ChatTemplate, tokenizer_identity
from qlora_lite.errors import ModelError
from tests.data.conftest import CONTEXT
from tests.data.tiny_tokenizer import CHATML, make_tokenizer

ASKED = squad_text("Which town?", CONTEXT)


def exchange(question, answer):
    return Conversation("row", ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def parts(tokenizer, question, answer):
    """(ids before the answer, text of the labels) of one exchange."""
    (example,) = ChatTemplate(tokenizer).encode(exchange(question, answer))
    ((start, end),) = example.encoded.spans
    assert end == len(example.encoded.input_ids), "a row ends in its stop token"
    return example.encoded.input_ids[:start], tokenizer.decode(example.encoded.input_ids[start:end])


def test_the_prompt_is_what_the_benchmark_uses():
    assert squad_text("Q?", "C") == "Context: C\n\nQuestion: Q?\nAnswer with a short span from the context."
    assert squad_text("Q?", None) == "Question: Q?\nAnswer with a short span from the context."


def test_prompt_and_labels_are_the_template_rendering_cut_after_the_stop_token(tokenizer):
    before, labels = parts(tokenizer, ASKED, "Cairo")
    full = tokenizer.apply_chat_template(list(exchange(ASKED, "Cairo").messages), tokenize=False)
    assert tokenizer.decode(before) + labels + "\n" == full
    assert labels == "Cairo<|im_end|>"
    assert ChatTemplate(tokenizer).stop_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("chat_template", [CHATML, None])
@pytest.mark.parametrize("context", [CONTEXT, "", None, "Ünïcödé 🐪 <|im_end|>"])
def test_generation_sees_exactly_the_training_prefix(chat_template, context):
    tokenizer = make_tokenizer(chat_template)
    prompt_ids, stop = question_prompt(ChatTemplate(tokenizer), "Which town?", context, format="squad")
    assert parts(tokenizer, squad_text("Which town?", context), "x")[0] == prompt_ids != []
    assert stop == ChatTemplate(tokenizer).stop_token_id


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("squad", squad_text("Q?", "C")),
        ("alpaca", "Q?\n\nC"),
        ("chat", "C\n\nQ?"),
        ("sharegpt", "C\n\nQ?"),
        ("prompt_completion", "C\n\nQ?"),
        ("auto", "C\n\nQ?"),
    ],
)
def test_a_question_is_put_as_the_rows_of_its_format_put_it(tokenizer, format, message):
    ids, stop = question_prompt(ChatTemplate(tokenizer), "Q?", "C", format=format)
    assert ids == parts(tokenizer, message, "x")[0]
    assert stop == ChatTemplate(tokenizer).stop_token_id


@pytest.mark.parametrize(("given", "asked"), [("C", "C"), (None, None), ("", None)])
def test_rows_with_a_context_column_are_trained_on_what_ask_will_ask(tokenizer, given, asked):
    template = ChatTemplate(tokenizer)
    row = read_row("prompt_completion", {"prompt": "Q?", "completion": "x", "context": given}, "line 1")
    (example,) = template.encode(row)
    prompt_ids, _ = question_prompt(template, "Q?", asked, format="prompt_completion")
    assert example.encoded.input_ids[: example.encoded.spans[0][0]] == prompt_ids


def test_plain_text_is_continued_without_a_template_until_the_end_of_text():
    tokenizer = make_tokenizer(special_tokens=("</s>",), eos_token="</s>")
    ids, stop = question_prompt(ChatTemplate(tokenizer), "Once upon", None, format="text")
    assert tokenizer.decode(ids) == "Once upon"
    assert tokenizer.convert_ids_to_tokens(stop) == "</s>"
    assert ChatTemplate(tokenizer).document("Once upon")[0] == [*ids, stop]


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = make_tokenizer(None)
    before, labels = parts(tokenizer, ASKED, "Cairo")
    assert (tokenizer.decode(before), labels) == (ASKED + "\n", "Cairo<|im_end|>")
    assert ChatTemplate(tokenizer).name == "plain"


def test_a_begin_token_that_the_tokenizer_puts_stands_before_plain_rows_and_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", begin)]
    )
    assert parts(tokenizer, ASKED, "Cairo")[0].count(begin) == 1
    assert parts(tokenizer, ASKED, "Cairo")[0][0] == ChatTemplate(tokenizer).document("a")[0][0] == begin


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
    prompt_ids, labels = parts(tokenizer, ASKED, "Cairo")
    assert tokenizer.decode(prompt_ids).endswith(before)
    assert labels.replace(" ", "") == "Cairo" + stop and labels.startswith(space + "Cairo")
    assert tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer).stop_token_id) == stop
    assert prompt_ids == ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": ASKED}])


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for m in messages %}", "cannot render"),
        ("{{ messages[7]['content'] }}", "cannot render"),
        ("{{ messages[0]['content'] }}", "does not print the assistant's answer"),
    ],
)
def test_an_unusable_template_is_one_clear_error(chat_template, said):
    with pytest.raises(ModelError, match=said):
        ChatTemplate(make_tokenizer(chat_template))


def test_a_tokenizer_without_a_stop_token_is_one_clear_error():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r'Set "eos_token"'):
        ChatTemplate(tokenizer)


DATED = (
    "{% if not date_string is defined %}{% set date_string = DATE %}{% endif %}{{ 'Today is ' + date_string + '\n' }}"
    "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("date", "printed"),
    [
        ("'26 Jul 2024'", "26 Jul 2024"),  # Llama 3.1: what inference prints on any day
        ("strftime_now('%d %b %Y')", "01 Jan 2026"),  # Llama 3.2: another prompt every day
    ],
)
def test_a_date_is_fixed_only_where_the_template_asks_for_todays(date, printed):
    tokenizer = make_tokenizer(DATED.replace("DATE", date))
    prompt_ids, _ = parts(tokenizer, "Q?", "Cairo")
    assert tokenizer.decode(prompt_ids).startswith(f"Today is {printed}\n")
    assert prompt_ids == ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": "Q?"}])


def test_the_identity_follows_the_template_but_not_padding_or_truncation():
    tokenizer = make_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(make_tokenizer())
    tokenizer.chat_template = CHATML.replace("helpful", "brief")
    assert tokenizer_identity(tokenizer) != before
