"""How a conversation becomes token ids, and which of them are trained.

In: a `Conversation` and a tokenizer. Out: `Encoded`: ids and the spans of them that carry labels, each an assistant's turn with its stop
token. The text is the tokenizer's own chat template's, or a plain one's when it has none ("{message}\\n" for everybody, and the
end-of-sequence token after an answer).

How the turns are found, by position and never by token id (the pad token may equal the stop token):

    prompt    = template(messages before the turn, with its generation prompt)     what generation will see
    turn      = template(messages up to the turn) without that prompt in front     what generation is to say

The prompt's ids come first, whatever follows, then the turn's. Of several turns, the next one is appended only if the ids of *its*
prompt begin with all ids so far. So for every trained turn, the ids before it are exactly those that inference sees at that turn. Where a
template rewrites earlier turns (Qwen3 drops their thoughts), the next turn begins an example of its own.

Surprising:
- A row ends at the stop token; what a template puts after it ("\\n" in ChatML) is left out.
- Text that a template puts between its generation prompt and the answer (an empty thinking block, say) belongs to the prompt.
- A turn with thoughts is asked for with `enable_thinking`, one without them without it.
- Where a template has no system role, the system's text is put before the first user message.
- Mistral v0.3 prints the system's text in the last user message only, while that message is last: in no finished conversation.
- Templates that print today's date (`strftime_now`) get a fixed one where they allow it (`date_string`), so a run can be repeated
  tomorrow. One that prints a date of its own (Llama 3.1) keeps it, as inference does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

from qlora_lite.data.limited import Limits, TooMuch
from qlora_lite.data.rows import Conversation, Message, short
from qlora_lite.errors import ModelError
from qlora_lite.foreign import foreign
from qlora_lite.limits import RENDERED_CHARS, TEMPLATE_BYTES, TEMPLATE_CHARS, TEMPLATE_SECONDS
from qlora_lite.units import row_in_words

# A tokenizer of transformers; typed as Any because its classes are only typed in part.
Tokenizer = Any

_PROBE_PROMPT, _PROBE_ANSWER = "Question: probe?", "Xanadu"
# Read by the templates that know them, ignored by the others. Thinking models get their empty thinking block as prompt.
_TEMPLATE_SETTINGS: dict[str, Any] = {"enable_thinking": False}
_FIXED_DATE = {"date_string": "01 Jan 2026"}  # for templates that ask for today's
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Encoded:
    """One tokenized example. Labels are the tokens of `spans`; the first token of a row has none, nothing predicts it."""

    input_ids: list[int]
    spans: tuple[tuple[int, int], ...]  # half-open ranges, at least one, in order

    def __post_init__(self) -> None:
        edges = [1, *(edge for span in self.spans for edge in span), len(self.input_ids)]
        is_in_order = all(left <= right for left, right in pairwise(edges))
        assert is_in_order and self.spans and all(start < end for start, end in self.spans), (self.spans, edges[-1])

    @property
    def num_label_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)

    @property
    def predictors(self) -> list[int]:
        """Positions whose next token carries a label, in order."""
        return [position for start, end in self.spans for position in range(start - 1, end - 1)]


@dataclass(frozen=True)
class EncodedTurns:
    """Some turns of a conversation in one example; `last` is the index of its last trained message in the conversation."""

    encoded: Encoded
    last: int


class ChatTemplate:
    """A tokenizer's chat template (or the plain one), and what rendering a short conversation tells about it.

    Making one raises ModelError when the template fails, loses the answer, or neither it nor the tokenizer has a token to stop at.
    """

    name: str  # "the tokenizer's chat template" or "plain", for people
    stop_token_id: int  # every trained turn ends in it; generation stops there
    has_system_role: bool

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name = "the tokenizer's chat template" if tokenizer.chat_template else "plain"
        self._where = tokenizer.name_or_path or "tokenizer"
        self._refuse_size()
        self._stopped = ""  # why nothing is rendered any more
        self._limits = Limits(seconds=TEMPLATE_SECONDS, num_bytes=TEMPLATE_BYTES)
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special_ids = {*tokenizer.all_special_ids, *added} - {
            None
        }  # a special token may be none of the vocabulary
        asks_for_today = "strftime_now" in (tokenizer.chat_template or "")
        self._settings = _TEMPLATE_SETTINGS | (_FIXED_DATE if asks_for_today else {})
        self._known_roles = {"assistant"}  # roles seen in a rendering; "" stands for tools
        asked: list[Message] = [{"role": "user", "content": _PROBE_PROMPT}]
        prompt = self._render(asked, generate=True)
        head, found, self._tail = self._render(
            [*asked, {"role": "assistant", "content": _PROBE_ANSWER}], generate=False
        ).rpartition(_PROBE_ANSWER)
        if not found:
            raise ModelError(
                f"{self._where}: the chat template leaves the assistant's answer out, so there is nothing to train on. "
                f"A chat template must print the content of assistant messages; fix it or remove it (plain prompts)."
            )
        # A template that rewrites the turn (a reasoning model dropping its thoughts) does not continue the generation prompt:
        # then the answer follows that prompt directly, in training and in generation alike.
        between = head.removeprefix(prompt) if head.startswith(prompt) else ""
        self._before = between.rstrip(" ")  # part of the prompt
        self._space = between[len(self._before) :]  # part of the answer: tokenizers join it to the first word
        self._after, self.stop_token_id = self._split_at_stop(self._tail)
        self.has_system_role = self._prints_system(asked)

    def _refuse_size(self) -> None:
        template = self.tokenizer.chat_template or ""
        texts = list(template.values()) if isinstance(template, dict) else [template]  # several, each with a name
        if not all(isinstance(text, str) for text in texts):
            raise ModelError(f"{self._where}: the chat template is no text. Mend it, or remove it (plain prompts).")
        num_chars = sum(map(len, texts))
        if num_chars > TEMPLATE_CHARS:
            raise ModelError(
                f"{self._where}: a chat template of {num_chars:,} characters, allowed {TEMPLATE_CHARS:,}. Remove it (plain prompts)."
            )

    def encode(self, conversation: Conversation) -> list[EncodedTurns]:
        """Every trained turn of a conversation in as few examples as keep each turn's prefix what inference sees; never cut.

        Raises ModelError, naming row and roles, for a conversation that the template cannot render.
        """
        assert conversation.trained_turns, "a row without an answer is a bad row"
        try:
            return self._encode(conversation)
        except ModelError as error:
            raise ModelError(f"{row_in_words(conversation.id)}: {error}") from error

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids to generate the next assistant turn from: the ids before that turn in training. Raises ModelError."""
        placed, _ = self._place_system(messages)
        return self._tokenize_prompt(self._render(placed, tools, generate=True) + self._before)

    def document_ids(self, text: str, *, is_finished: bool = True) -> list[int]:
        """Token ids of plain text, between the tokenizer's begin token (if it puts one) and, when finished, its end token."""
        end = [self.end_token_id] if is_finished else []
        return [*self._begin_ids(), *self._tokenize(text, split_special_tokens=True), *end]

    @property
    def end_token_id(self) -> int:
        """The token that ends a document. Raises ModelError when the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._where}: no end-of-sequence token, so a trained answer would never stop. "
                f'Set "eos_token" in tokenizer_config.json.'
            )
        return int(self.tokenizer.eos_token_id)

    def _encode(self, conversation: Conversation) -> list[EncodedTurns]:
        messages, num_merged = self._place_system(conversation.messages)
        tools = conversation.tools
        turns = [turn - num_merged for turn in conversation.trained_turns]
        self._check_roles(messages, turns, tools)
        examples: list[EncodedTurns] = []
        for turn in turns:
            prompt_ids, answer_ids = self._turn_ids(messages, turn, tools)
            start = len(prompt_ids)
            if start == 0:
                raise ModelError(
                    f"{self._where}: no token stands before the answer, so nothing predicts its first token"
                )
            spans: tuple[tuple[int, int], ...] = ((start, start + len(answer_ids)),)
            if examples and prompt_ids[: len(examples[-1].encoded.input_ids)] == examples[-1].encoded.input_ids:
                spans = examples.pop().encoded.spans + spans
            examples.append(EncodedTurns(Encoded([*prompt_ids, *answer_ids], spans), last=turn + num_merged))
        return examples

    def _turn_ids(self, messages: list[Message], turn: int, tools: Sequence[Any]) -> tuple[list[int], list[int]]:
        """-> (ids to generate message `turn` from, ids of that message and its stop token)."""
        message, history = messages[turn], messages[:turn]
        finished = self._render(messages[: turn + 1], tools, generate=False)
        prompt = self._render(history, tools, generate=True) + self._before
        if not finished.startswith(prompt):  # the turn has thoughts, or the template rewrites it
            thinking = self._render(history, tools, generate=True, enable_thinking=True)
            prompt = thinking if finished.startswith(thinking) else prompt
        if finished.startswith(prompt) and finished.endswith(self._tail):
            text = finished[len(prompt) : len(finished) - len(self._tail)] + self._after
        elif "tool_calls" not in message:
            text = self._space + str(message["content"]).strip() + self._after
        else:
            text = self._call_text(history, message, tools)
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
            raise ModelError(
                f"{self._where}: the chat template does not print a message with tool_calls after its generation prompt and "
                f"before its stop token, so it cannot be told which tokens to train. Leave such rows out, or change the template."
            )
        prompt_ids = self._tokenize_prompt(prompt)
        answer_ids = self._answer_ids(prompt, prompt_ids, text, is_call="tool_calls" in message)
        return prompt_ids, [*answer_ids, self.stop_token_id]

    def _call_text(self, history: list[Message], message: Message, tools: Sequence[Any]) -> str:
        """A message with tool_calls where the template rewrites its prompt: its text without a system message, or ""."""
        bare = [message for message in history if message["role"] != "system"]
        prompt = self._render(bare, tools, generate=True) + self._before
        finished = self._render([*bare, message], tools, generate=False)
        is_found = finished.startswith(prompt) and finished.endswith(self._tail)
        return finished[len(prompt) : len(finished) - len(self._tail)] + self._after if is_found else ""

    def _answer_ids(self, prompt: str, prompt_ids: list[int], text: str, *, is_call: bool) -> list[int]:
        """Ids of an answer behind its prompt: as in the whole text where that leaves the prompt's ids alone, otherwise tokenized apart.

        (SentencePiece tokenizers put a space before a text that begins anew.) An answer that spells "<|im_end|>" must not put a stop
        token in the middle of the labels; a tool call is not what people wrote, and its special tokens are meant.
        """
        together = self._tokenize_prompt(prompt + text)
        answer_ids = together[len(prompt_ids) :]
        is_continued = together[: len(prompt_ids)] == prompt_ids
        if is_continued and (is_call or self._special_ids.isdisjoint(answer_ids)):
            return answer_ids
        return self._tokenize(text, split_special_tokens=not is_call)

    def _place_system(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """-> (messages that the template can render, how many were merged into the next)."""
        is_system = bool(messages) and messages[0]["role"] == "system"
        if self.has_system_role or not is_system or len(messages) < 2 or messages[1]["role"] != "user":
            return list(messages), 0
        system, user = messages[0]["content"].strip(), messages[1]
        merged = {**user, "content": f"{system}\n\n{user['content']}"} if system else user
        return [merged, *messages[2:]], 1

    def _check_roles(self, messages: list[Message], turns: list[int], tools: Sequence[Any]) -> None:
        """Refuse a role, or tools, that the template would leave out in silence; once per role.

        What counts is what is seen at a trained turn, not the finished conversation, where a system message may be gone again.
        """
        for index, message in enumerate(messages[: turns[-1]]):
            if message["role"] in self._known_roles:
                continue
            probe = [*messages[:index], message | {"content": _PROBE_ANSWER}, *messages[index + 1 :]]
            seen = (self._render(probe[:turn], tools, generate=True) for turn in turns if turn > index)
            if not any(_PROBE_ANSWER in text for text in seen):
                raise ModelError(
                    f'{self._where}: the chat template leaves messages of the role "{message["role"]}" out. '
                    f"Give it a template that prints them, or leave such messages out of the data."
                )
            self._known_roles.add(message["role"])
        if tools and "" not in self._known_roles:
            if self._render(messages, tools, generate=False) == self._render(messages, generate=False):
                raise ModelError(
                    f"{self._where}: the chat template takes no tools. Give it a template that prints them, put them in a "
                    f'system message, or remove the column "tools".'
                )
            self._known_roles.add("")

    def _prints_system(self, asked: list[Message]) -> bool:
        try:
            text = self._render([{"role": "system", "content": _PROBE_ANSWER}, *asked], generate=True)
        except ModelError:
            return False
        return _PROBE_ANSWER in text

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, generate: bool, **settings: Any
    ) -> str:
        if self._stopped:  # not again for every row
            raise ModelError(self._stopped)
        try:
            text = self._limits.run(
                lambda: self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=None if self.tokenizer.chat_template else _PLAIN_TEMPLATE,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **self._settings | settings,
                )
            )
        except TooMuch as error:
            self._stopped = f"{self._where}: the chat template takes {error} for one conversation. Change it, or remove it (plain prompts)."
            raise ModelError(self._stopped) from error
        except Exception as error:  # a template is foreign code: it can raise anything
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
            raise ModelError(
                f"{self._where}: the chat template cannot render messages of the roles {roles}: {short(str(error), 300)}. "
                f"Change the data or the template, or remove it (plain prompts)."
            ) from error
        if len(text) > RENDERED_CHARS:
            raise ModelError(
                f"{self._where}: the chat template makes {len(text):,} characters of one conversation, allowed {RENDERED_CHARS:,}"
            )
        return str(text)

    def _tokenize_prompt(self, text: str) -> list[int]:
        begin = [] if self.tokenizer.chat_template else self._begin_ids()  # a chat template prints its own
        return [*begin, *self._tokenize(text, split_special_tokens=False)]

    def _tokenize(self, text: str, *, split_special_tokens: bool) -> list[int]:
        with foreign(lambda said: ModelError(f"{self._where}: the tokenizer cannot read a text ({said})")):
            ids: list[int] = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
            )["input_ids"]
        return ids

    def _begin_ids(self) -> list[int]:
        """The begin token in a list, where the tokenizer puts one before a text; otherwise []."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return []
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return [int(begin)] if ids and ids[0] == begin else []

    def _split_at_stop(self, tail: str) -> tuple[str, int]:
        """`tail` is what follows an answer. -> (text before the stop token, id of the stop token)."""
        stops = {self.tokenizer.convert_ids_to_tokens(i): i for i in self._special_ids}
        # The first special token in the text; of two that start at the same place, the longer one.
        found = sorted((tail.index(text), -len(text), token_id) for text, token_id in stops.items() if text in tail)
        if found:
            position, _, token_id = found[0]
            return tail[:position], token_id
        return "", self.end_token_id


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
    probe = ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": _PROBE_PROMPT}])  # may hold the date
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map, probe, _TEMPLATE_SETTINGS, _FIXED_DATE]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
