"""Conversations -> token ids, and the ids that are trained.

In: a `Conversation` and a tokenizer. Out: `Encoded`: ids, and the spans with labels, each an assistant turn with its stop token. The text
comes from the tokenizer's chat template, or from a plain one if it has none ("{message}\\n" for every role, and the end-of-sequence
token after an answer).

Turns are located by position, never by token id (the pad token may equal the stop token):

    prompt    = template(messages before the turn, with its generation prompt)     input of generation
    turn      = template(messages up to the turn) without that prompt in front     expected output

The ids of the prompt come first, then those of the turn. The next turn is appended only if the ids of *its* prompt begin with all ids so
far. So the ids before every trained turn are exactly those at inference. If a template rewrites earlier turns (Qwen3 drops their
thoughts), the next turn begins a new example.

Surprising:
- An example ends at the stop token; text of the template after it ("\\n" in ChatML) is left out.
- Text of the template between its generation prompt and the answer (an empty thinking block, for example) belongs to the prompt.
- A turn with thoughts is prompted with `enable_thinking`, a turn without thoughts without it.
- If a template has no system role, the system text is put before the first user message.
- Mistral v0.3 prints the system text only in the last user message, if that is the last message: in no finished conversation.
- A special token spelled in an answer becomes that token if data.special_tokens names it or the template prints it (</think>, the
  markers of a tool). Stop, end, begin and pad tokens and role markers stay ordinary characters (spelling.py).
- An answer or text that already ends in a stop token gets no second one.
- Templates with today's date (`strftime_now`) get a fixed date if they support it (`date_string`), which makes runs repeatable. A
  template with a built-in date (Llama 3.1) keeps it, as at inference.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple

from qlora_lite.data.limited import Limits, TooMuch
from qlora_lite.data.rows import Conversation, Message, short
from qlora_lite.data.spelling import Spelling, any_of, found_in
from qlora_lite.errors import ModelError
from qlora_lite.foreign import foreign
from qlora_lite.limits import RENDERED_CHARS, TEMPLATE_BYTES, TEMPLATE_CHARS, TEMPLATE_SECONDS
from qlora_lite.units import row_in_words

# A tokenizer of transformers; Any, because its classes are only partly typed.
Tokenizer = Any

_PROBE_PROMPT, _PROBE_ANSWER = "Question: probe?", "Xanadu"
# Ignored by templates that do not use them. Thinking models get their empty thinking block in the prompt.
_TEMPLATE_SETTINGS: dict[str, Any] = {"enable_thinking": False}
_FIXED_DATE = {"date_string": "01 Jan 2026"}  # for templates that print today's date
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)


# Names of tokens that end a turn or a text; a template may print several.
_ENDS = re.compile(
    r"(?i)(?<![a-z])(eo[stm]|end_?of_?(text|turn|message|sentence|utterance)|im_end|return|end)(?![a-z])"
)
_OURS = ("role", "content", "tool_calls", "weight")  # keys of a message that are handled elsewhere
_PROBES = 20  # messages to test before a key counts as ignored by the template


@dataclass(frozen=True)
class Vocabulary:
    """Facts about the tokens of a base besides its tokenizer."""

    own_tokens: tuple[str, ...] = ()  # data.special_tokens: become tokens in answers, and have embedding rows
    num_rows: int | None = None  # embedding rows of the base, without those of own tokens; None: unknown
    stops: tuple[int, ...] = ()  # stop ids of its generation settings

    @classmethod
    def of(cls, config: Any, own_tokens: Sequence[str], stops: Sequence[int]) -> "Vocabulary":
        """Make the vocabulary of a base from its transformers config."""
        return cls(tuple(own_tokens), config.get_text_config(decoder=True).vocab_size, tuple(stops))


UNKNOWN_BASE = Vocabulary()


class TokenWithoutRow(ModelError):
    """A used token has an id beyond the embedding: not a bad row, but the tokenizer of another base."""


class NothingToTrain(ModelError):
    """A row with only stop tokens."""


class Remark(NamedTuple):
    """A change to a row, counted for the notes: `kind` is a key of `fit.TemplateNotes`, `about` a token or a key."""

    kind: str
    about: str


@dataclass(frozen=True)
class Encoded:
    """One tokenized example. Labels are the tokens of `spans`; the first token of an example has no label: nothing predicts it."""

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
    """One example with some turns of a conversation; `last` is the index of its last trained message in the conversation."""

    encoded: Encoded
    last: int
    remarks: frozenset[Remark] = frozenset()


class ChatTemplate:
    """A tokenizer's chat template (or the plain one), with properties found by rendering a short conversation.

    The constructor raises ModelError when the template fails, loses the answer, or neither it nor the tokenizer has a stop token.
    """

    name: str  # "the tokenizer's chat template" or "plain", for display
    stop_token_id: int  # ends every trained turn; generation stops there
    has_system_role: bool

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary = UNKNOWN_BASE) -> None:
        self.tokenizer = tokenizer
        self._num_rows = vocabulary.num_rows
        self._own_tokens = frozenset(vocabulary.own_tokens)
        self.name = "the tokenizer's chat template" if tokenizer.chat_template else "plain"
        self._where = tokenizer.name_or_path or "tokenizer"
        self._refuse_size()
        self._stopped = ""  # reason for rendering no more
        self._limits = Limits(seconds=TEMPLATE_SECONDS, num_bytes=TEMPLATE_BYTES)
        added = tokenizer.added_tokens_decoder
        ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        # text -> id; a special token may be missing from the vocabulary
        self._special = {str(tokenizer.convert_ids_to_tokens(i)): i for i in ids if i is not None}
        self._added = {token.content: i for i, token in added.items() if token.content.strip()}
        asks_for_today = "strftime_now" in (tokenizer.chat_template or "")
        self._settings = _TEMPLATE_SETTINGS | (_FIXED_DATE if asks_for_today else {})
        self._known_roles = {"assistant"}  # roles seen in a rendering; "" stands for tools
        asked: list[Message] = [{"role": "user", "content": _PROBE_PROMPT}]
        prompt = self._render(asked, generate=True)
        head, answer, self._tail = self._render(
            [*asked, {"role": "assistant", "content": _PROBE_ANSWER}], generate=False
        ).rpartition(_PROBE_ANSWER)
        if not answer:
            raise ModelError(
                f"{self._where}: the chat template does not print the assistant's answer, so there is nothing to train on. "
                f"Change the template to print the content of assistant messages, or remove it (plain prompts)."
            )
        # A template that rewrites the turn (a reasoning model dropping its thoughts) does not continue the generation prompt:
        # then the answer directly follows that prompt, in training and in generation.
        between = head.removeprefix(prompt) if head.startswith(prompt) else ""
        self._before = between.rstrip(" ")  # part of the prompt
        self._space = between[len(self._before) :]  # part of the answer: tokenizers join it to the first word
        self._after, self.stop_token_id = self._split_at_stop(self._tail)
        self._special[self._text_of(self.stop_token_id)] = self.stop_token_id
        ends = (self.stop_token_id, tokenizer.eos_token_id, *(i for i in vocabulary.stops if i in ids))
        self._ends = {self._text_of(i): int(i) for i in ends if i is not None}
        self._any_special = any_of(self._special)
        self._places: Counter[tuple[str, str]] = Counter()  # (role, key) -> messages in which the template left it out
        self.has_system_role = self._prints_system(asked)

    def _refuse_size(self) -> None:
        template = self.tokenizer.chat_template or ""
        texts = list(template.values()) if isinstance(template, dict) else [template]  # several named templates
        if not all(isinstance(text, str) for text in texts):
            raise ModelError(f"{self._where}: the chat template is not text. Correct it, or remove it (plain prompts).")
        num_chars = sum(map(len, texts))
        if num_chars > TEMPLATE_CHARS:
            raise ModelError(
                f"{self._where}: chat template of {num_chars:,} characters, allowed {TEMPLATE_CHARS:,}. Remove it (plain prompts)."
            )

    def encode(self, conversation: Conversation) -> list[EncodedTurns]:
        """Encode every trained turn of a conversation in the fewest examples whose prefixes equal those at inference; never cut.

        Raises ModelError, with row and roles, for a conversation that the template cannot render.
        """
        assert conversation.trained_turns, "a row without an answer is a bad row"
        try:
            return self._encode(conversation)
        except TokenWithoutRow:
            raise
        except ModelError as error:
            raise ModelError(f"{row_in_words(conversation.id)}: {error}") from error

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Return the prompt ids of the next assistant turn, equal to the ids before that turn in training. Raises ModelError."""
        placed, _ = self._place_system([self._without_ends(message) for message in messages])
        ids = self._prompt_ids(self._render(placed, tools, generate=True) + self._before)
        self._refuse_without_row([*ids, self.stop_token_id])
        return ids

    def document(self, text: str) -> tuple[list[int], frozenset[Remark]]:
        """Plain text -> (ids between the tokenizer's begin token, if it has one, and one end token; remarks).

        Spelled special tokens become tokens: the text may be a conversation rendered by a template. A text that ends in an end-of-text
        token or the template's stop token keeps it. Raises NothingToTrain for a text with only such tokens.
        """
        body, ends = self._split_ends(text)
        if ends and not body.strip():
            raise NothingToTrain("a text with only stop tokens")
        ids = [*self.document_ids(body), self._ends[ends[0]] if ends else self.end_token_id]
        self._refuse_without_row(ids)
        remarks = [Remark("document", token) for token in sorted(found_in(body, self._any_special))]
        return ids, frozenset([*remarks, *(Remark("ended", token) for token in ends)])

    def document_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue: without an end token."""
        ids, begin = self._tokenize(text), self._begin_ids()
        ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
        self._refuse_without_row(ids)
        return ids

    def answer_text(self, text: str) -> str:
        """Return an answer without stop tokens at its end, as it is trained and compared."""
        return self._split_ends(text)[0]

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Special tokens that are not part of any answer's text."""
        return frozenset(self._spelling.tokens.values())

    @property
    def stop_token_ids(self) -> list[int]:
        """All ids that end an example: the stop token of turns, the end of text, and the base's other stop tokens."""
        return sorted(set(self._ends.values()))

    @property
    def end_token_id(self) -> int:
        """The token that ends a document. Raises ModelError when the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._where}: no end-of-sequence token: a trained answer would never stop. "
                f'Set "eos_token" in tokenizer_config.json.'
            )
        return int(self.tokenizer.eos_token_id)

    def _encode(self, conversation: Conversation) -> list[EncodedTurns]:
        remarks = self._remarks(conversation)
        messages, num_merged = self._place_system([self._without_ends(message) for message in conversation.messages])
        tools = conversation.tools
        turns = [turn - num_merged for turn in conversation.trained_turns]
        self._check_roles(messages, turns, tools)
        remarks |= self._left_out(messages, turns, tools)
        examples: list[EncodedTurns] = []
        for turn in turns:
            prompt_ids, answer_ids = self._turn_ids(messages, turn, tools)
            start = len(prompt_ids)
            if start == 0:
                raise ModelError(f"{self._where}: no token before the answer, so nothing predicts its first token")
            spans: tuple[tuple[int, int], ...] = ((start, start + len(answer_ids)),)
            if examples and prompt_ids[: len(examples[-1].encoded.input_ids)] == examples[-1].encoded.input_ids:
                spans = examples.pop().encoded.spans + spans
            encoded = Encoded([*prompt_ids, *answer_ids], spans)
            examples.append(EncodedTurns(encoded, last=turn + num_merged, remarks=frozenset(remarks)))
            self._refuse_without_row(encoded.input_ids)
        return examples

    def _remarks(self, conversation: Conversation) -> set[Remark]:
        """Collect remarks: stop tokens removed from answers, special tokens kept as characters, reserved tokens spelled in prompts."""
        remarks: set[Remark] = set()
        for turn in conversation.trained_turns:
            message = conversation.messages[turn]
            body, ends = self._split_ends(message["content"])
            if ends and not body.strip() and all(key in ("role", "content", "weight") for key in message):
                raise NothingToTrain("an answer with only stop tokens")
            answer = {**message, "content": body}
            if found_in(answer, self._any_special):
                spelled = found_in(answer, self._spelling.pattern)
                remarks |= {Remark("guarded" if self._is_guarded(token) else "spelled", token) for token in spelled}
            remarks |= {Remark("ended", token) for token in ends}
        for index, message in enumerate(conversation.messages[: conversation.trained_turns[-1]]):
            if index not in conversation.trained_turns:
                marks = found_in(self._without_ends(message)["content"], self._any_special)
                remarks |= {Remark("prompt", mark) for mark in marks if self._is_guarded(mark)}
        return remarks

    def _left_out(self, messages: list[Message], turns: list[int], tools: Sequence[Any]) -> set[Remark]:
        """Find keys of messages, such as "name", that the template ignores; each is tested in a conversation that ends in it."""
        remarks: set[Remark] = set()
        for index, message in enumerate(messages[: turns[-1] + 1]):
            keys = [key for key, value in message.items() if key not in _OURS and value]
            keys += ["content"] if message.get("tool_calls") and message["content"].strip() else []
            for key in keys:
                place = (str(message["role"]), key)
                if self._places[place] < _PROBES:
                    is_printed = self._prints_key(messages[: index + 1], key, tools, is_trained=index in turns)
                    self._places[place] = -(2**60) if is_printed else self._places[place] + 1
                if self._places[place] > 0:
                    remarks.add(Remark("left out", key))
        return remarks

    def _prints_key(self, messages: list[Message], key: str, tools: Sequence[Any], *, is_trained: bool) -> bool:
        last = messages[-1]
        without = {**last, "content": ""} if key == "content" else {k: v for k, v in last.items() if k != key}
        versions = [messages, [*messages[:-1], without]]
        try:
            if is_trained:
                with_key, without_key = (self._turn_text(version, len(messages) - 1, tools)[1] for version in versions)
            else:
                is_asked = last["role"] != "assistant"
                with_key, without_key = (self._render(version, tools, generate=is_asked) for version in versions)
        except ModelError:
            return True  # the template reads the key, or fails on the row, which rendering reports
        return with_key != without_key

    def _turn_ids(self, messages: list[Message], turn: int, tools: Sequence[Any]) -> tuple[list[int], list[int]]:
        """-> (prompt ids of message `turn`, ids of that message and its stop token)."""
        message = messages[turn]
        is_spelled = bool(found_in(message, self._any_special)) and bool(found_in(message, self._spelling.pattern))
        if is_spelled:  # mark tokens spelled in the answer, to distinguish them from those of the template
            kept = {key: message[key] for key in ("role", "weight") if key in message}
            message = {key: self._spelling.marked(value) for key, value in message.items()} | kept
        prompt, text = self._turn_text([*messages[:turn], message], turn, tools)
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
            raise ModelError(
                f"{self._where}: the chat template does not print a message with tool_calls after its generation prompt and "
                f"before its stop token, so the tokens to train cannot be located. Remove such rows, or change the template."
            )
        own_ids = self._tokenize(prompt)
        prompt_ids = [*self._prompt_begin(), *own_ids]
        if is_spelled:
            answer_ids = self._ids_behind(prompt, self._spelling.ids(prompt), text, self._spelling.ids)
        else:
            answer_ids = self._ids_behind(prompt, own_ids, text, self._tokenize)
        if self.stop_token_id in answer_ids:
            raise ModelError(
                f"{self._where}: the chat template prints its stop token {self._text_of(self.stop_token_id)} inside an answer, so "
                f"generation would end there. Remove such rows, or change the template."
            )
        return prompt_ids, [*answer_ids, self.stop_token_id]

    def _turn_text(self, messages: list[Message], turn: int, tools: Sequence[Any]) -> tuple[str, str]:
        """-> (prompt text of message `turn`, text of that message without its stop token)."""
        message, history = messages[turn], messages[:turn]
        finished = self._render(messages[: turn + 1], tools, generate=False)
        prompt = self._render(history, tools, generate=True) + self._before
        if not finished.startswith(prompt):  # the turn has thoughts, or the template rewrites it
            thinking = self._render(history, tools, generate=True, enable_thinking=True)
            prompt = thinking if finished.startswith(thinking) else prompt
        if finished.startswith(prompt) and finished.endswith(self._tail):
            return prompt, finished[len(prompt) : len(finished) - len(self._tail)] + self._after
        if "tool_calls" not in message:
            return prompt, self._space + str(message["content"]).strip() + self._after
        return prompt, self._call_text(history, message, tools)

    def _call_text(self, history: list[Message], message: Message, tools: Sequence[Any]) -> str:
        """Render a message with tool_calls whose prompt the template rewrites, without system messages; "" if that fails too."""
        bare = [message for message in history if message["role"] != "system"]
        prompt = self._render(bare, tools, generate=True) + self._before
        finished = self._render([*bare, message], tools, generate=False)
        has_prompt = finished.startswith(prompt) and finished.endswith(self._tail)
        return finished[len(prompt) : len(finished) - len(self._tail)] + self._after if has_prompt else ""

    @staticmethod
    def _ids_behind(prompt: str, prompt_ids: list[int], text: str, tokenize: Callable[[str], list[int]]) -> list[int]:
        """Tokenize `text` together with `prompt` if that keeps the ids of `prompt`, else separately.

        SentencePiece tokenizers put a space before a separate text.
        """
        together = tokenize(prompt + text)
        is_kept = together[: len(prompt_ids)] == prompt_ids
        return together[len(prompt_ids) :] if is_kept else tokenize(text)

    def _without_ends(self, message: Message) -> Message:
        """Remove the stop tokens at the end of an assistant message."""
        if message["role"] != "assistant":
            return message
        body, ends = self._split_ends(message["content"])
        return {**message, "content": body} if ends else message

    def _split_ends(self, text: str) -> tuple[str, list[str]]:
        """-> (the text without stop and end-of-text tokens at its end, these tokens in order); (text unchanged, []) without any."""
        ends: list[str] = []
        stripped = text.rstrip()
        while end := next((token for token in self._ends if stripped.endswith(token)), None):
            ends.insert(0, end)
            text = stripped.removesuffix(end)
            stripped = text.rstrip()
        return text, ends

    @cached_property
    def _spelling(self) -> Spelling:
        """The special tokens that stay ordinary characters in an answer."""
        kept = {token: i for token, i in self._special.items() if self._is_guarded(token) or not self._is_meant(token)}
        return Spelling(self.tokenizer, kept, self._where)

    def _is_guarded(self, token: str) -> bool:
        """Whether the token is reserved: a stop, begin, end or pad token, or a role marker."""
        is_end = bool(_ENDS.search(token)) and token not in self._own_tokens
        return is_end or token in self._ends or token in self._named_tokens or token in self._role_markers

    def _is_meant(self, token: str) -> bool:
        """Whether data.special_tokens names it, or the template prints it."""
        return token in self._own_tokens or token in self._source

    @cached_property
    def _named_tokens(self) -> frozenset[str]:
        """The tokenizer's begin, end, pad, unknown ... tokens."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
        return frozenset(str(getattr(self.tokenizer, name, None)) for name in names)

    @cached_property
    def _source(self) -> str:
        template = self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else template

    @cached_property
    def _role_markers(self) -> frozenset[str]:
        """The special tokens that the template prints around user, system and tool messages, and before assistant messages."""
        asked: list[Message] = [{"role": "user", "content": _PROBE_PROMPT}]
        answered: list[Message] = [*asked, {"role": "assistant", "content": _PROBE_ANSWER}]
        asking, prompt = self._render(asked, generate=False), self._render(asked, generate=True) + self._before
        texts = [asking]
        for role in ("system", "developer", "tool"):
            other: Message = {"role": role, "content": _PROBE_PROMPT}
            try:
                text = self._render([*answered, other] if role == "tool" else [other, *asked], generate=False)
            except ModelError:
                continue  # the template has no such role
            texts.append(text.rpartition(_PROBE_ANSWER)[2])
        header = prompt.rpartition(_PROBE_PROMPT)[2]
        markers = {token for text in texts for token in self._any_special.findall(text)}
        while first := self._any_special.match(header.lstrip()):  # a run of tokens without a closing counterpart
            if f"</{first[0][1:]}" in self._source:
                break
            markers.add(first[0])
            header = header.lstrip()[first.end() :]
        return frozenset(markers)

    def _refuse_without_row(self, ids: Sequence[int]) -> None:
        """Raise TokenWithoutRow for the first id beyond the embedding that data.special_tokens gives no row."""
        if self._num_rows is None or max(ids, default=0) < self._num_rows:
            return
        for token_id in ids:
            token = self._text_of(token_id)
            if token_id >= self._num_rows and token not in self._own_tokens:
                raise TokenWithoutRow(
                    f"{self._where}: the tokenizer's token {short(token)!r} has the id {token_id}, but the base's embedding has "
                    f"{self._num_rows:,} rows (ids 0 to {self._num_rows - 1:,}), so the model cannot read it. Use the tokenizer "
                    f"of this base, or name the token in data.special_tokens: it then gets a trained embedding row"
                )

    def _text_of(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(int(token_id)))

    def _place_system(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """-> (messages that the template can render, the number merged into the next one)."""
        is_system = bool(messages) and messages[0]["role"] == "system"
        if self.has_system_role or not is_system or len(messages) < 2 or messages[1]["role"] != "user":
            return list(messages), 0
        system, user = messages[0]["content"].strip(), messages[1]
        merged = {**user, "content": f"{system}\n\n{user['content']}"} if system else user
        return [merged, *messages[2:]], 1

    def _check_roles(self, messages: list[Message], turns: list[int], tools: Sequence[Any]) -> None:
        """Raise ModelError for a role, or tools, that the template silently ignores; tests each role once.

        Tests the prompts of trained turns, not the finished conversation, where a system message may be missing again.
        """
        for index, message in enumerate(messages[: turns[-1]]):
            if message["role"] in self._known_roles:
                continue
            probe = [*messages[:index], message | {"content": _PROBE_ANSWER}, *messages[index + 1 :]]
            seen = (self._render(probe[:turn], tools, generate=True) for turn in turns if turn > index)
            if not any(_PROBE_ANSWER in text for text in seen):
                raise ModelError(
                    f'{self._where}: the chat template ignores messages of the role "{message["role"]}". '
                    f"Use a template that prints them, or remove such messages from the data."
                )
            self._known_roles.add(message["role"])
        if tools and "" not in self._known_roles:
            if self._render(messages, tools, generate=False) == self._render(messages, generate=False):
                raise ModelError(
                    f"{self._where}: the chat template ignores tools. Use a template that prints them, put them in a "
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
        if self._stopped:  # do not retry for every row
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
        except Exception as error:  # a template is foreign code and can raise anything
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
            raise ModelError(
                f"{self._where}: the chat template cannot render messages of the roles {roles}: {short(str(error), 300)}. "
                f"Change the data or the template, or remove it (plain prompts)."
            ) from error
        if len(text) > RENDERED_CHARS:
            raise ModelError(
                f"{self._where}: the chat template renders one conversation as {len(text):,} characters, allowed {RENDERED_CHARS:,}"
            )
        return str(text)

    def _prompt_ids(self, text: str) -> list[int]:
        return [*self._prompt_begin(), *self._tokenize(text)]

    def _prompt_begin(self) -> list[int]:
        return [] if self.tokenizer.chat_template else self._begin_ids()  # a chat template prints its own

    def _tokenize(self, text: str) -> list[int]:
        with foreign(lambda reason: ModelError(f"{self._where}: the tokenizer cannot read a text ({reason})")):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        return ids

    def _begin_ids(self) -> list[int]:
        """Return [begin token] if the tokenizer puts one before a text, else []."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return []
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return [int(begin)] if ids and ids[0] == begin else []

    def _split_at_stop(self, tail: str) -> tuple[str, int]:
        """`tail`, the text after an answer -> (text before the stop token, id of the stop token)."""
        for stops in (self._special, self._added):  # some tokenizers do not mark their stop token as special
            # The first token in the text; the longer of two that start at the same place.
            places = sorted(
                (tail.index(text), -len(text), token_id) for text, token_id in stops.items() if text in tail
            )
            if places:
                position, _, token_id = places[0]
                return tail[:position], token_id
        return "", self.end_token_id


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of everything that determines the ids of a row: vocabulary, rules, template and a rendered probe.

    Ignores the backend's padding and truncation: they are settings of the last call, not of the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only "fast" tokenizers have one
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    probe = ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": _PROBE_PROMPT}])  # may contain the date
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map, probe, _TEMPLATE_SETTINGS, _FIXED_DATE]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
