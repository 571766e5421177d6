"""Random conversations, templates and token tables, compared with transformers' own apply_chat_template.

For every trained turn: the ids before it are those that inference sees, its decoded labels are the turn's text and one stop token, and
no label is on a prompt token.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_lite.data.rows import Conversation
from qlora_lite.data.template import ChatTemplate, Vocabulary
from tests.data.tiny_tokenizer import make_tokenizer

# Short templates in the style of the well-known ones; name -> (template, its special tokens, stop token)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}{% else %}{{ m['content'] | trim + '<|eot|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '[SYS]' + m['content'] + '[/SYS]' }}{% else %}{% generation %}"
    "{{ ' ' + m['content'] + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] | trim + '</turn>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] | trim + '</turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
QWEN = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.index0 > last.user %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STYLES = {
    "chatml": (CHATML, ("<|im_end|>",), "<|im_end|>"),
    "llama": (LLAMA, ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>"),
    "mistral": (MISTRAL, ("<s>", "[INST]", "[/INST]", "[SYS]", "[/SYS]", "</s>"), "</s>"),
    "gemma": (GEMMA, ("<bos>", "<turn>", "</turn>"), "</turn>"),
    "qwen": (QWEN, ("<think>", "</think>"), "<|im_end|>"),
}
SPACE = {"mistral": " "}
WORDS = st.text(st.sampled_from("ab é\n<|>/."), min_size=1, max_size=12).filter(str.strip)
EXTRA = ("<|fact|>", "<|x|>", "[NOTE]")  # which of them a tokenizer has, and which are meant, is drawn
STYLES_DRAWN = st.sampled_from(sorted(STYLES))


def texts(tokens):
    """A few words with special tokens between them."""
    return st.lists(WORDS | st.sampled_from(tokens), min_size=1, max_size=4).map("".join).filter(str.strip)


@st.composite
def conversations(draw, tokens):
    system = draw(st.none() | WORDS)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            {"role": "user", "content": draw(texts(tokens))},
            {"role": "assistant", "content": draw(texts(tokens))},
        ]
    return messages


def made(style, extra, own):
    template, tokens, stop = STYLES[style]
    tokenizer = make_tokenizer(template, special_tokens=(*tokens, *extra), eos_token=stop, pad_token=stop)
    return tokenizer, ChatTemplate(tokenizer, Vocabulary(own))


def seen(tokenizer, template, messages):
    """Ids that inference sends to have the next turn said, the system's text where the template takes it."""
    if messages[0]["role"] == "system" and not template.has_system_role:
        text = f"{messages[0]['content'].strip()}\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": text}, *messages[2:]]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)


def without_ends(text, stop):
    left = text.rstrip()
    return without_ends(left.removesuffix(stop), stop) if left.endswith(stop) else text


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), STYLES_DRAWN, st.sets(st.sampled_from(EXTRA)), st.sets(st.sampled_from(EXTRA)))
def test_every_turn_is_its_text_and_one_stop_behind_what_inference_sees(data, style, extra, own):
    own &= extra
    tokenizer, template = made(style, sorted(extra), sorted(own))
    stop = STYLES[style][2]
    messages = data.draw(conversations([*EXTRA, *STYLES[style][1], stop]))
    cleaned = [m | {"content": without_ends(m["content"], stop)} if m["role"] == "assistant" else m for m in messages]
    if not all(m["content"].strip() for m in cleaned):
        return  # an answer of nothing but stop tokens is a bad row
    turns = iter([i for i, m in enumerate(messages) if m["role"] == "assistant"])
    for example in template.encode(Conversation("row", tuple(messages))):
        ids = example.encoded.input_ids
        for start, end in example.encoded.spans:
            turn = next(turns)
            answer = cleaned[turn]["content"]
            answer = answer if style in ("chatml", "mistral", "qwen") else answer.strip()
            found = tokenizer.decode(ids[start:end])
            assert ids[:start] == seen(tokenizer, template, cleaned[:turn])
            assert found in (SPACE.get(style, "") + answer + stop, SPACE.get(style, "") + answer.strip() + stop)
            assert ids[start:end].count(template.stop_token_id) == 1 and ids[end - 1] == template.stop_token_id
            special = set(tokenizer.convert_ids_to_tokens(ids[start : end - 1])) & {*EXTRA, *STYLES[style][1]}
            printed = {"<think>", "</think>"} if style == "qwen" else set()
            assert special <= own | printed
            assert {token for token in own if token in answer} <= special | {stop}
    assert next(turns, None) is None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(["chatml", "llama", "gemma", "mistral"]))
def test_labels_are_those_of_transformers_assistant_mask(data, style):
    tokenizer, template = made(style, (), ())
    messages = data.draw(conversations(["plain"]))
    if messages[0]["role"] == "system" and not template.has_system_role:
        messages = messages[1:]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = template.encode(Conversation("row", tuple(messages)))
    ids, length = example.encoded.input_ids, len(example.encoded.input_ids)
    assert ids == theirs["input_ids"][:length]
    ours = [int(any(start <= i < end for start, end in example.encoded.spans)) for i in range(length)]
    assert ours == theirs["assistant_masks"][:length] and not any(theirs["assistant_masks"][length:])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), STYLES_DRAWN)
def test_a_conversation_rendered_before_has_transformers_ids_up_to_its_last_stop(data, style):
    tokenizer, template = made(style, (), ())
    messages = data.draw(conversations(["plain"]))
    messages = messages if template.has_system_role else [m for m in messages if m["role"] != "system"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = template.document(text)[0]
    theirs = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == theirs[: len(ids)] and ids[-1] == template.stop_token_id
    assert template.stop_token_id not in theirs[len(ids) :]
