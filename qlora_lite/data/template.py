"""How a question becomes token ids, and which of them are trained.

In: a `QuestionRow` and a tokenizer. Out: `Encoded`: the prompt, then the answer and one stop token; only these last two carry labels.

The prompt is rendered with the tokenizer's own chat template, or with a plain one ("{prompt}\\n", then the answer, then the
end-of-sequence token) when it has none. Surprising:
- Labels are found by position, never by token id: the pad token may equal the stop token.
- Prompt and answer are tokenized separately and joined, so the prompt's ids are exactly those that generation will see.
- A row ends at the stop token; what a template puts after it ("\\n" in ChatML) is left out.
- Text that a template puts between its generation prompt and the answer (an empty thinking block, say) belongs to the prompt.
- Templates that print today's date get a fixed one where they allow it (`date_string`), so a run can be repeated tomorrow.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from qlora_lite.data.squad import QuestionRow
from qlora_lite.errors import ModelError

# A tokenizer of transformers; typed as Any because its classes are only typed in part.
Tokenizer = Any

_PROBE_PROMPT, _PROBE_ANSWER = "Question: probe?", "Xanadu"
# Read by the templates that know them, ignored by the others. Thinking models get their empty thinking block as prompt.
_TEMPLATE_SETTINGS: dict[str, Any] = {"enable_thinking": False, "date_string": "01 Jan 2026"}


@dataclass(frozen=True)
class Encoded:
    """One tokenized example. Labels are `input_ids[label_start:]`: the answer and the stop token."""

    input_ids: list[int]
    label_start: int

    @property
    def num_label_tokens(self) -> int:
        return len(self.input_ids) - self.label_start


@dataclass(frozen=True)
class AnswerFormat:
    """What a tokenizer's template puts around an answer, learned by rendering one short conversation."""

    before: str  # after the generation prompt, before the answer: part of the prompt
    space: str  # spaces directly before the answer: part of the answer, because tokenizers join them to its first word
    after: str  # between the answer and the stop token, nearly always empty
    stop_token_id: int
    name: str  # "the tokenizer's chat template" or "plain", for people


def prompt_text(question: str, context: str | None) -> str:
    """The user's message, before any chat template. The benchmark's other side uses the same text."""
    asked = f"Question: {question}\nAnswer with a short span from the context."
    return asked if context is None else f"Context: {context}\n\n{asked}"


def encode_row(
    tokenizer: Tokenizer, row: QuestionRow, *, no_answer_text: str, answer_format: AnswerFormat | None = None
) -> Encoded:
    """Prompt, first gold answer (`no_answer_text` for an unanswerable row) and stop token; never truncated.

    Pass `answer_format` (from `read_answer_format`) to spare rendering the probe for every row. Raises ModelError as that does.
    """
    answer_format = answer_format or read_answer_format(tokenizer)
    prompt_ids = _encode_prompt(tokenizer, answer_format, row.question, row.context)
    answer = row.answers[0] if row.answers else no_answer_text
    answer_ids = _encode_answer(tokenizer, answer_format, answer)
    return Encoded([*prompt_ids, *answer_ids, answer_format.stop_token_id], label_start=len(prompt_ids))


def encode_prompt(tokenizer: Tokenizer, question: str, context: str | None) -> list[int]:
    """Token ids to generate an answer from: exactly the unlabelled prefix that `encode_row` makes. Raises ModelError."""
    return _encode_prompt(tokenizer, read_answer_format(tokenizer), question, context)


def stop_token_id(tokenizer: Tokenizer) -> int:
    """The token every trained row ends in; generation stops there. Raises ModelError."""
    return read_answer_format(tokenizer).stop_token_id


def read_answer_format(tokenizer: Tokenizer) -> AnswerFormat:
    """Render one short conversation and read off what surrounds the answer.

    Raises ModelError when the template fails, loses the answer, or neither it nor the tokenizer has a token to stop at.
    """
    if not tokenizer.chat_template:
        return AnswerFormat("", "", "", _end_of_sequence(tokenizer), name="plain")
    prompt = _render(tokenizer, [{"role": "user", "content": _PROBE_PROMPT}], add_generation_prompt=True)
    full = _render(
        tokenizer,
        [{"role": "user", "content": _PROBE_PROMPT}, {"role": "assistant", "content": _PROBE_ANSWER}],
        add_generation_prompt=False,
    )
    head, found, tail = full.rpartition(_PROBE_ANSWER)
    if not found:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: the chat template leaves the assistant's answer out, so there is nothing "
            f"to train on. A chat template must print the content of assistant messages; fix it or remove it (plain prompts)."
        )
    # A template that rewrites the turn (a reasoning model dropping its thoughts) does not continue the generation prompt:
    # then the answer follows that prompt directly, in training and in generation alike.
    between = head.removeprefix(prompt) if head.startswith(prompt) else ""
    before = between.rstrip(" ")
    after, stop = _split_at_stop(tokenizer, tail)
    return AnswerFormat(before, between[len(before) :], after, stop, name="the tokenizer's chat template")


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """SHA-256 over all that decides how this tokenizer turns a row into ids: vocabulary, rules, template and what it renders.

    The backend's padding and truncation are left out: they are settings of the last call, not of the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only "fast" tokenizers have one
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    probe = _render_prompt(tokenizer, _PROBE_PROMPT)  # a template may print the date, or follow a setting
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map, probe, _TEMPLATE_SETTINGS]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _encode_prompt(tokenizer: Tokenizer, answer_format: AnswerFormat, question: str, context: str | None) -> list[int]:
    rendered = _render_prompt(tokenizer, prompt_text(question, context)) + answer_format.before
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokenizer.chat_template and _puts_bos_first(tokenizer):
        ids = [tokenizer.bos_token_id, *ids]  # a chat template prints its own
    return ids


def _encode_answer(tokenizer: Tokenizer, answer_format: AnswerFormat, answer: str) -> list[int]:
    # Split special tokens: an answer that spells "<|im_end|>" must not put a stop token in the middle of the labels.
    text = answer_format.space + answer.strip() + answer_format.after
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _render_prompt(tokenizer: Tokenizer, content: str) -> str:
    if not tokenizer.chat_template:
        return content + "\n"
    return _render(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **_TEMPLATE_SETTINGS
        )
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: the chat template cannot render a user message and an answer: {error}. "
            f"It must accept the roles user and assistant; fix it or remove it (plain prompts)."
        ) from error


def _split_at_stop(tokenizer: Tokenizer, tail: str) -> tuple[str, int]:
    """`tail` is what follows an answer. -> (text before the stop token, id of the stop token)."""
    stops = {tokenizer.convert_ids_to_tokens(i): i for i in tokenizer.all_special_ids}
    stops |= {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The first special token in the text; of two that start at the same place, the longer one.
    found = sorted((tail.index(text), -len(text), token_id) for text, token_id in stops.items() if text in tail)
    if found:
        position, _, token_id = found[0]
        return tail[:position], token_id
    return "", _end_of_sequence(tokenizer)


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'tokenizer'}: no end-of-sequence token, so a trained answer would never stop. "
            f'Set "eos_token" in tokenizer_config.json.'
        )
    return int(tokenizer.eos_token_id)


def _puts_bos_first(tokenizer: Tokenizer) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
