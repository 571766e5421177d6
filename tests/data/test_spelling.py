"""Special tokens that people spell: tokens where they are meant, characters where they would end or begin a turn; one stop at every end."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.fit import TemplateNotes, fit_row
from qlora_lite.data.formats import read_row
from qlora_lite.data.prompts import question_prompt
from qlora_lite.data.rows import Conversation, Document, QuestionRow
from qlora_lite.data.template import ChatTemplate, TokenWithoutRow, Vocabulary
from qlora_lite.errors import DataError, ModelError
from tests.data.families import FAMILIES
from tests.data.tiny_tokenizer import CHATML, make_tokenizer
from tests.reading import inspect_rows, load_examples

QWEN = FAMILIES["qwen"].template
# A turn with thoughts holds markers that the template prints, as gpt-oss has it.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}{% if m['role'] == 'assistant' %}"
    "{% if m['thinking'] %}{{ '<|channel|>thoughts<|message|>' + m['thinking'] + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
    "{% else %}{{ '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MARKERS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
REASONING = CHATML.replace(
    "message['role'] + '\n' +",
    "message['role'] + '\n' + ('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '') +",
)


def turn(answer, **more):
    return Conversation("row", ({"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer, **more}))


def labels(tokenizer, row, *own):
    """(ids of the labels, what is said of the row)"""
    template, notes = ChatTemplate(tokenizer, Vocabulary(own)), TemplateNotes()
    examples, _ = fit_row(template, row, no_answer_text="none", max_seq_length=None)
    notes.count(template, row, examples)
    (start, end) = examples[-1].encoded.spans[-1]
    return examples[-1].encoded.input_ids[start:end], " / ".join(notes.sentences)


def tokens(tokenizer, *texts):
    return [tokenizer.convert_tokens_to_ids(text) for text in texts]


@pytest.mark.parametrize("answer", ["<|yes|>", "<|yes|><|yes|>", "yes <|yes|> no", "<|im_end|> is no <|yes|>"])
def test_a_token_of_data_special_tokens_is_one_id_in_an_answer(answer):
    tokenizer = make_tokenizer(special_tokens=("<|yes|>",))
    found, _ = labels(tokenizer, turn(answer), "<|yes|>")
    assert found.count(*tokens(tokenizer, "<|yes|>")) == answer.count("<|yes|>")
    assert tokenizer.decode(found) == answer + "<|im_end|>"
    assert found.count(tokenizer.eos_token_id) == 1


def test_a_special_token_that_nobody_names_stays_characters_and_is_counted():
    tokenizer = make_tokenizer(special_tokens=("<|fim|>",))
    found, said = labels(tokenizer, turn("write <|fim|>"))
    assert tokens(tokenizer, "<|fim|>")[0] not in found and tokenizer.decode(found) == "write <|fim|><|im_end|>"
    assert said.startswith("1 row spell special tokens inside an answer that neither") and "(<|fim|>)" in said


def test_a_token_that_the_template_prints_is_one_id_in_an_answer():
    tokenizer = make_tokenizer(QWEN, special_tokens=("<think>", "</think>"))
    found, said = labels(tokenizer, turn("<think>\nhard\n</think>\n\nyes"))
    assert [found.count(each) for each in tokens(tokenizer, "<think>", "</think>")] == [1, 1]
    assert tokenizer.decode(found) == "<think>\nhard\n</think>\n\nyes<|im_end|>" and said == ""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "plain"])
def test_markers_of_roles_and_ends_stay_characters_inside_an_answer(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    for marker in (*family.special_tokens, family.bos, family.eos, family.stop):
        found, said = labels(tokenizer, turn(f"say {marker} and go"), marker)
        assert tokenizer.decode(found) == f"{family.space}say {marker} and go{family.after}{family.stop}"
        assert set(found[:-1]).isdisjoint(tokens(tokenizer, marker)), marker
        assert marker in said


@pytest.mark.parametrize("ending", ["{}", "{}\n", "{0}{0}", "{0}\n{0} ", "{}<|endoftext|>", "<|endoftext|>"])
def test_an_answer_that_ends_in_a_stop_token_is_trained_with_exactly_one(ending):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    found, said = labels(tokenizer, turn("yes" + ending.format("<|im_end|>")))
    assert found == tokenizer("yes", add_special_tokens=False)["input_ids"] + tokens(tokenizer, "<|im_end|>")
    assert "1 row already ended in a stop token" in said


def test_later_turns_and_scores_see_the_answer_without_the_stop_token_it_ended_in():
    tokenizer = make_tokenizer()
    talk = [m for i in (1, 2) for m in turn(f"yes {i}<|im_end|>").messages]
    (example,), _ = fit_row(
        ChatTemplate(tokenizer), Conversation("row", tuple(talk)), no_answer_text="n", max_seq_length=None
    )
    assert example.answers == ("yes 2",)
    assert "<|im_end|><|im_end|>" not in tokenizer.decode(example.encoded.input_ids)
    question = QuestionRow("q", "yes", "Q?", ("yes<|im_end|>",))
    (example,), _ = fit_row(ChatTemplate(tokenizer), question, no_answer_text="n", max_seq_length=None)
    assert example.answers == ("yes",) and example.encoded.input_ids.count(tokenizer.eos_token_id) == 3


def test_an_answer_of_nothing_but_stop_tokens_is_a_bad_row():
    with pytest.raises(ModelError, match="only stop tokens"):
        ChatTemplate(make_tokenizer()).encode(turn("<|im_end|>\n<|im_end|>"))


def test_markers_that_the_template_prints_between_thought_and_answer_are_tokens_and_those_people_spell_are_not():
    tokenizer = make_tokenizer(CHANNELS, special_tokens=MARKERS)
    thought = "<|end|> ends <|return|>"
    found, said = labels(tokenizer, turn("say <|end|>", thinking=thought))
    printed = [token for token in tokenizer.convert_ids_to_tokens(found) if token in MARKERS]
    assert printed == ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"]
    text = f"<|channel|>thoughts<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>say <|end|><|return|>"
    assert tokenizer.decode(found) == text
    assert "<|end|>, <|return|>" in said and "thinking" not in said


def test_a_value_of_a_tool_call_that_spells_the_stop_token_does_not_end_the_turn():
    tokenizer = FAMILIES["llama3"].tokenizer()
    call = {"type": "function", "function": {"name": "print", "arguments": {"text": "<|eot_id|>"}}}
    found, _ = labels(tokenizer, turn("", tool_calls=[call]))
    assert found.count(*tokens(tokenizer, "<|eot_id|>")) == 1
    assert tokenizer.decode(found) == '{"name": "print", "arguments": {"text": "<|eot_id|>"}}<|eot_id|>'


def test_pieces_that_are_whole_words_of_the_vocabulary_are_spelled_out_too():
    pieces = ["<unk>", "<s>", "</s>", *"<>/abcs:? QA"]
    backend = Tokenizer(models.Unigram([(piece, 0.0 if len(piece) > 1 else -5.0) for piece in pieces], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "Q:{{ messages[0]['content'] }}A:{% if messages[1:] %}{{ messages[1]['content'] + eos_token }}{% endif %}"
    )
    found, _ = labels(tokenizer, turn("a</s>b"))
    assert tokenizer.convert_ids_to_tokens(found) == [*"a</s>b", "</s>"]


def test_a_conversation_rendered_before_gives_the_ids_that_its_template_gives():
    tokenizer = make_tokenizer()
    messages = list(turn("Cairo").messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = ChatTemplate(tokenizer).document(text)[0]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)[: len(ids)] and text.endswith(
        "<|im_end|>\n"
    )
    assert ids.count(tokenizer.eos_token_id) == 3 and ids[-1] == tokenizer.eos_token_id
    _, said = labels(tokenizer, Document("row", text))
    assert "ended in a stop token" in said and "<|im_end|>, <|im_start|>" in said


@pytest.mark.parametrize("ending", ["<|im_end|>\n<|endoftext|>", "<|im_end|>", "<|im_end|>\n"])
def test_a_text_keeps_the_stop_token_that_it_ends_in_first(ending):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    assert tokenizer.decode(ChatTemplate(tokenizer).document("a" + ending)[0]) == "a<|im_end|>"
    assert tokenizer.decode(ChatTemplate(tokenizer).document("a")[0]) == "a<|endoftext|>"


def test_a_text_that_spells_its_begin_token_gets_no_second_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    template = ChatTemplate(tokenizer)
    assert template.document("<|im_start|>a")[0] == template.document("a")[0]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "name", "audio"])
def test_a_key_without_a_place_in_the_template_is_counted_once_with_its_rows(key, write):
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", key: "x"}]}] * 30
    rows += [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", key: ""}]}]
    report = inspect_rows(write(rows), make_tokenizer(), num_rows=None, no_answer_text="n", max_seq_length=None)
    assert [note for note in report.notes if key in note] == [
        f'the chat template ignores "{key}" in messages: 30 rows lost it'
    ]


def test_keys_of_users_tools_and_sharegpt_turns_are_counted_too():
    messages = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A"}]
    messages += [{"role": "tool", "content": "T", "tool_call_id": "1"}, {"role": "assistant", "content": "B"}]
    _, said = labels(make_tokenizer(), Conversation("row", tuple(messages)))
    assert '"name"' in said and '"tool_call_id"' in said
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "reasoning": "x"}]
    _, said = labels(make_tokenizer(), read_row("sharegpt", {"conversations": turns}, "line 1"))
    assert '"reasoning"' in said


def test_thoughts_reach_a_template_that_has_a_place_for_them():
    tokenizer = make_tokenizer(REASONING, special_tokens=("<think>", "</think>"))
    found, said = labels(tokenizer, turn("yes", reasoning_content="hard"))
    assert tokenizer.decode(found) == "<think>hard</think>yes<|im_end|>" and said == ""
    assert found[0] == tokens(tokenizer, "<think>")[0]


def test_content_beside_a_tool_call_that_the_template_leaves_out_is_counted():
    call = {"type": "function", "function": {"name": "towns", "arguments": {}}}
    _, said = labels(FAMILIES["llama3"].tokenizer(), turn("I look it up.", tool_calls=[call]))
    assert '"content"' in said


def beyond(num_rows):
    return make_tokenizer(CHATML.replace("<|im_end|>", "<|done|>"), special_tokens=("<|done|>", "<|spare|>")), num_rows


def test_an_id_beyond_the_embedding_is_refused_with_its_token_and_the_number_of_rows(write, tmp_path):
    tokenizer, num_rows = beyond(320)
    vocabulary = Vocabulary(num_rows=num_rows)
    path = write(json.dumps({"prompt": "Q", "completion": "A"}) + "\n", "rows.jsonl")
    settings = {"num_rows": None, "no_answer_text": "n", "max_seq_length": None, "vocabulary": vocabulary}
    said = r"token '<\|done\|>' has the id 320, but the base's embedding has 320 rows"
    with pytest.raises(TokenWithoutRow, match=said):
        inspect_rows(path, tokenizer, **settings)
    with pytest.raises(TokenWithoutRow, match=said):
        load_examples(path, tokenizer, cache_dir=tmp_path / "c", **settings)
    with pytest.raises(TokenWithoutRow, match=said):
        question_prompt(ChatTemplate(tokenizer, vocabulary), "Q", None, format="chat")


def test_tokens_beyond_the_embedding_that_nothing_uses_do_no_harm_and_named_ones_get_rows():
    tokenizer, _ = beyond(321)
    template = ChatTemplate(tokenizer, Vocabulary(num_rows=321))
    assert template.encode(turn("A")) and template.prompt_ids([{"role": "user", "content": "Q"}])
    assert template.encode(turn("<|spare|>")), "it stays characters in an answer"
    with pytest.raises(TokenWithoutRow, match="spare"):
        template.prompt_ids([{"role": "user", "content": "<|spare|>"}])
    assert ChatTemplate(tokenizer, Vocabulary(("<|done|>",), 320)).encode(turn("A"))


def test_a_stop_token_that_the_tokenizer_does_not_call_special_is_the_stop_token():
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "<|done|>"))
    tokenizer.add_tokens(["<|done|>"])
    found, _ = labels(tokenizer, turn("a <|done|> b<|done|>"))
    assert found[-1:] == tokens(tokenizer, "<|done|>") and found.count(found[-1]) == 1
    assert tokenizer.decode(found) == "a <|done|> b<|done|>"


def test_too_many_answers_without_text_are_refused(write):
    path = write([{"prompt": "Q", "completion": "<|im_end|>"}])
    with pytest.raises(DataError, match="only stop tokens"):
        inspect_rows(path, make_tokenizer(), num_rows=None, no_answer_text="n", max_seq_length=None)
