"""Every family's template: exactly the assistant's tokens and stop are trained, behind exactly the tokens that inference sees."""

import string

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.rows import Conversation
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import ModelError
from tests.data.families import FAMILIES


def chat(*contents, system=None, name="row"):
    """User and assistant in turn, behind a system message when there is one."""
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(name, (*head, *turns))


TALK = (
    "Which river flows through Egypt?",
    "The Nile.",
    "And which town lies on it?",
    "Cairo, for one.",
    "Another?",
    "Luxor",
)


def at_inference(tokenizer, messages, **settings):
    """Token ids a chat program would send to have `messages` answered."""
    if not tokenizer.chat_template:
        ends = {"assistant": tokenizer.eos_token + "\n"}
        text = "".join(m["content"] + ends.get(m["role"], "\n") for m in messages)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    settings = {"enable_thinking": False} | settings
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **settings)


def trained_turns(tokenizer, examples):
    """(ids before the turn, text of the turn) for every span of every example."""
    return [
        (example.encoded.input_ids[:start], tokenizer.decode(example.encoded.input_ids[start:end]))
        for example in examples
        for start, end in example.encoded.spans
    ]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_is_trained_with_its_stop_behind_what_inference_sees(name, system):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    conversation = chat(*TALK, system=system)
    found = trained_turns(tokenizer, template.encode(conversation))

    assert [text for _, text in found] == [
        f"{family.space}{answer}{family.after}{family.stop}" for answer in TALK[1::2]
    ]
    seen = list(conversation.messages)
    if system and not template.has_system_role:
        seen = [{"role": "user", "content": f"{system}\n\n{TALK[0]}"}, *seen[2:]]
    for (before, _), turn in zip(found, [i for i, m in enumerate(seen) if m["role"] == "assistant"], strict=True):
        assert (
            before
            == at_inference(tokenizer, seen[:turn])
            == template.prompt_ids(conversation.messages[: turn + len(conversation.messages) - len(seen)])
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_share_one_example_unless_the_template_rewrites_the_earlier_ones(name):
    examples = ChatTemplate(FAMILIES[name].tokenizer()).encode(chat(*TALK))
    assert [len(example.encoded.spans) for example in examples] == ([1, 1, 1] if name == "qwen" else [3])
    assert [example.last for example in examples] == ([1, 3, 5] if name == "qwen" else [5])


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen", "plain"}))
def test_the_text_of_an_example_is_the_templates_up_to_the_last_stop(name):
    tokenizer = FAMILIES[name].tokenizer()
    (example,) = ChatTemplate(tokenizer).encode(chat(*TALK))
    whole = tokenizer.apply_chat_template(list(chat(*TALK).messages), tokenize=False)
    text = tokenizer.decode(example.encoded.input_ids)
    assert whole.startswith(text) and text.endswith(FAMILIES[name].stop)
    assert TALK[5] in text


def test_the_families_without_a_system_role_are_known():
    without = {name for name, family in FAMILIES.items() if not ChatTemplate(family.tokenizer()).has_system_role}
    assert without == {"gemma", "mistral_v1"}


def test_a_system_text_that_only_the_last_user_message_carries_makes_one_example_a_turn():
    tokenizer = FAMILIES["mistral_v3"].tokenizer()
    template = ChatTemplate(tokenizer)
    examples = template.encode(chat(*TALK, system="Be brief."))
    assert [example.last for example in examples] == [2, 4, 6]
    texts = [tokenizer.decode(example.encoded.input_ids) for example in examples]
    assert texts[0] == f"<s>[INST] Be brief.\n\n{TALK[0]}[/INST] {TALK[1]}</s>"
    assert texts[1] == f"<s>[INST] {TALK[0]}[/INST] {TALK[1]}</s>[INST] Be brief.\n\n{TALK[2]}[/INST] {TALK[3]}</s>"
    assert [text.count("Be brief.") for text in texts] == [1, 1, 1]
    spans = [example.encoded.spans for example in examples]
    assert all(len(each) == 1 for each in spans), "earlier answers are prompt there"
    assert len(template.encode(chat(*TALK))) == 1, "nothing is rewritten where there is no system message"


def test_thoughts_are_trained_where_they_are_given_and_asked_for_with_thinking_on():
    tokenizer = FAMILIES["qwen"].tokenizer()
    thought = "<think>\nEgypt has one river.\n</think>\n\nThe Nile."
    conversation = chat(TALK[0], thought, TALK[2], "Cairo")
    first, second = ChatTemplate(tokenizer).encode(conversation)
    messages = list(conversation.messages)
    assert trained_turns(tokenizer, [first]) == [
        (at_inference(tokenizer, messages[:1], enable_thinking=True), thought + "<|im_end|>")
    ]
    assert trained_turns(tokenizer, [second]) == [(at_inference(tokenizer, messages[:3]), "Cairo<|im_end|>")]
    assert "Egypt has one river" not in tokenizer.decode(second.encoded.input_ids), "inference drops earlier thoughts"


TOOLS = ({"type": "function", "function": {"name": "towns", "parameters": {"type": "object", "properties": {}}}},)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "towns", "arguments": {}}}],
}


def test_a_tool_call_is_trained_and_the_tools_answer_is_not():
    tokenizer = FAMILIES["llama3"].tokenizer()
    messages = (
        {"role": "user", "content": "Towns?"},
        CALL,
        {"role": "tool", "content": "Luxor"},
        {"role": "assistant", "content": "Luxor."},
    )
    (example,) = ChatTemplate(tokenizer).encode(Conversation("row", messages, TOOLS))
    found = trained_turns(tokenizer, [example])
    assert [text for _, text in found] == ['{"name": "towns", "arguments": {}}<|eot_id|>', "Luxor.<|eot_id|>"]
    for (before, _), turn in zip(found, (1, 3), strict=True):
        assert before == at_inference(tokenizer, list(messages[:turn]), tools=list(TOOLS))
    assert "Tools: " in tokenizer.decode(example.encoded.input_ids)


def test_a_tool_call_is_trained_where_the_finished_conversation_has_lost_the_system_text():
    tokenizer = FAMILIES["mistral_v3"].tokenizer()
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Towns?"}]
    found = trained_turns(tokenizer, ChatTemplate(tokenizer).encode(Conversation("row", (*asked, CALL))))
    assert found == [(at_inference(tokenizer, asked), '[TOOL_CALLS] [{"name": "towns", "arguments": {}}]</s>')]


def test_a_tool_call_that_the_template_does_not_print_is_refused():
    tokenizer = FAMILIES["chatml"].tokenizer()
    with pytest.raises(ModelError, match=r"row 7: .* does not print a message with tool_calls"):
        ChatTemplate(tokenizer).encode(Conversation("7", ({"role": "user", "content": "Towns?"}, CALL)))


@pytest.mark.parametrize(
    ("name", "role", "said"),
    [
        ("mistral_v1", "tool", "cannot render messages of the roles user, assistant, tool"),
        ("phi", "tool", 'ignores messages of the role "tool"'),
    ],
)
def test_a_role_that_the_template_does_not_know_is_named_with_row_and_template(name, role, said):
    tokenizer = FAMILIES[name].tokenizer()
    tokenizer.name_or_path = "some-model"
    messages = [{"role": r, "content": r} for r in ("user", "assistant", role, "assistant")]
    with pytest.raises(ModelError, match=f"row 7: some-model: the chat template {said}"):
        ChatTemplate(tokenizer).encode(Conversation("7", tuple(messages)))


def test_a_template_that_takes_no_tools_refuses_them():
    template = ChatTemplate(FAMILIES["chatml"].tokenizer())
    with pytest.raises(ModelError, match="ignores tools"):
        template.encode(Conversation("row", chat(*TALK).messages, TOOLS))


def test_only_the_completion_is_trained_when_the_prompt_holds_answers_too():
    tokenizer = FAMILIES["llama3"].tokenizer()
    conversation = Conversation("row", chat(*TALK).messages, first_trained=4)
    assert [text for _, text in trained_turns(tokenizer, ChatTemplate(tokenizer).encode(conversation))] == [
        "Luxor<|eot_id|>"
    ]


@pytest.mark.parametrize("name", ["llama3", "mistral_v3", "qwen"])
def test_a_turn_of_weight_0_is_prompt_for_those_behind_it(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    messages = [m | ({"weight": 0} if m["content"] == TALK[1] else {}) for m in chat(*TALK).messages]
    found = trained_turns(tokenizer, ChatTemplate(tokenizer).encode(Conversation("row", tuple(messages))))
    assert [text for _, text in found] == [f"{family.space}{answer}{family.stop}" for answer in TALK[3::2]]
    assert found[0][0] == at_inference(tokenizer, list(chat(*TALK).messages[:3]))


def test_an_answer_without_a_question_before_it_is_not_trained():
    tokenizer = FAMILIES["chatml"].tokenizer()
    greeting = {"role": "assistant", "content": "Hello!"}
    conversation = Conversation("row", (greeting, *chat(*TALK[:2]).messages))
    assert [text for _, text in trained_turns(tokenizer, ChatTemplate(tokenizer).encode(conversation))] == [
        "The Nile.<|im_end|>"
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_spells_the_stop_token_stops_once_only(name):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    template = ChatTemplate(tokenizer)
    answer = f"{family.stop} ends a turn"
    for example in template.encode(chat("What is it?", answer, "Again?", answer)):
        for start, end in example.encoded.spans:
            labels = example.encoded.input_ids[start:end]
            assert labels.count(template.stop_token_id) == 1 and labels[-1] == template.stop_token_id
            assert tokenizer.decode(labels) == f"{family.space}{answer}{family.after}{family.stop}"


def sentencepiece_like(template):
    """A tokenizer that puts a space before every text, as those of Llama 2 and the first Mistral do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["▁", *string.printable], show_progress=False
    )
    backend.train_from_iterator(TALK * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_an_answer_is_tokenized_as_in_the_whole_text_where_tokenizers_put_spaces():
    tokenizer = sentencepiece_like(FAMILIES["llama2"].template)
    (example,) = ChatTemplate(tokenizer).encode(chat(*TALK))
    whole = tokenizer.apply_chat_template(list(chat(*TALK).messages), return_dict=False)
    assert example.encoded.input_ids == whole
    assert len(example.encoded.spans) == 3
    start, end = example.encoded.spans[0]
    alone = tokenizer(" The Nile. ", add_special_tokens=False)["input_ids"]
    assert whole[start : end - 1] != alone, "alone it would have a space too many"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_is_trained_whole_behind_the_begin_token(name):
    tokenizer = FAMILIES[name].tokenizer()
    ids = ChatTemplate(tokenizer).document("The Nile flows.")[0]
    assert tokenizer.decode(ids) == "The Nile flows." + tokenizer.eos_token
