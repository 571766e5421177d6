"""Chat templates of the well-known families, written anew for tests: the same special tokens, spaces, generation prompt and stop.

| family  | as in the model card of        | what is peculiar                                                                    |
|---------|--------------------------------|-------------------------------------------------------------------------------------|
| chatml  | SmolLM2-1.7B-Instruct          | a system turn of its own when there is none                                         |
| llama2  | Llama-2-7b-chat-hf             | system inside the first user turn, a begin token per exchange, a space round answers |
| llama3  | Llama-3.1-8B-Instruct          | one begin token, contents trimmed, stop is not the end of text                      |
| mistral_v1 | Mistral-7B-Instruct-v0.1, 2 | refuses system and every other order than user, assistant, user ...                 |
| mistral_v3 | Mistral-7B-Instruct-v0.3    | system inside the last user turn, and only while that turn is the last message       |
| gemma   | gemma-2-9b-it                  | the assistant is called model, refuses system, stop is not the end of text           |
| phi     | Phi-3.5-mini-instruct          | the end of text follows the last turn, but not the turns before it                  |
| qwen    | Qwen3-8B                       | thoughts of earlier turns are dropped; an empty thinking block when it is switched off |
| plain   | a base model without a template | "{message}\\n", the end-of-sequence token after an answer                           |
"""

from dataclasses import dataclass
from typing import Any

from tests.data.tiny_tokenizer import CHATML, make_tokenizer

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}"
)

LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% for message in (messages[1:] if system else messages) %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{% set head = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first else '' %}"
    "{{ bos_token + '[INST] ' + head + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nTools: ' }}{{ tools | tojson }}{{ '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'][0]['function'] | tojson }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}{% set has_system = messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if has_system else messages) %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{% set head = messages[0]['content'] + '\n\n' if has_system and loop.last else '' %}"
    "{{ '[INST] ' + head + message['content'] + '[/INST]' }}"
    "{% elif message['tool_calls'] %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    + _ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN = (
    "{% set last = namespace(user=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set thoughts = '' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > last.user %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    template: str | None
    special_tokens: tuple[str, ...]
    bos: str
    eos: str
    stop: str  # what generation stops at
    space: str = ""  # before an answer
    after: str = ""  # between answer and stop

    def tokenizer(self) -> Any:
        return make_tokenizer(self.template, special_tokens=self.special_tokens, bos_token=self.bos, eos_token=self.eos)


FAMILIES = {
    "chatml": Family(CHATML, (), "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama2": Family(LLAMA2, ("<s>", "</s>"), "<s>", "</s>", "</s>", space=" ", after=" "),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "mistral_v1": Family(MISTRAL_V1, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", space=" "),
    "mistral_v3": Family(MISTRAL_V3, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", space=" "),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>"),
    "phi": Family(
        PHI, ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>", "<|end|>"
    ),
    "qwen": Family(QWEN, (), "<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    "plain": Family(None, ("<s>", "</s>"), "<s>", "</s>", "</s>"),
}
