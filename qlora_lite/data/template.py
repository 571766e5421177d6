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
- In an answer a special token that is spelled out is that token where somebody means it: data.special_tokens names it, or the template
  prints it (</think>, a tool's markers). Stop, end, begin and pad tokens and the markers of roles stay ordinary characters (spelling.py).
- An answer or a text that ends in a stop token already gets no second one.
- Templates that print today's date (`strftime_now`) get a fixed one where they allow it (`date_string`), so a run can be repeated
  tomorrow. One that prints a date of its own (Llama 3.1) keeps it, as inference does.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
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


# The names of tokens that end a turn or a text, of which a template may print several.
_ENDS = re.compile(
    r"(?i)(?<![a-z])(eo[stm]|end_?of_?(text|turn|message|sentence|utterance)|im_end|return|end)(?![a-z])"
)
_OURS = ("role", "content", "tool_calls", "weight")  # keys of a message that are read, or looked after, elsewhere
_PROBES = 20  # messages with a key that the template does not print, until the key is known to have no place


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a base's tokens besides its tokenizer."""

    own_tokens: tuple[str, ...] = ()  # data.special_tokens: spelled in an answer, they are meant, and they have rows
    num_rows: int | None = None  # of the base's embedding, before rows for own tokens; None: not known
    stops: tuple[int, ...] = ()  # ids that its own settings of generation stop at

    @classmethod
    def of(cls, config: Any, own_tokens: Sequence[str], stops: Sequence[int]) -> "Vocabulary":
        """Of a base with this config of transformers."""
        return cls(tuple(own_tokens), config.get_text_config(decoder=True).vocab_size, tuple(stops))


UNKNOWN_BASE = Vocabulary()


class TokenWithoutRow(ModelError):
    """A token that is used has an id beyond the embedding: not a bad row, but a tokenizer of another base."""


class NothingToTrain(ModelError):
    """A row of stop tokens alone."""


class Remark(NamedTuple):
    """Something that was done to a row, to be counted: `kind` is a key of `fit.TemplateNotes`, `about` a token or a key."""

    kind: str
    about: str


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
    remarks: frozenset[Remark] = frozenset()


class ChatTemplate:
    """A tokenizer's chat template (or the plain one), and what rendering a short conversation tells about it.

    Making one raises ModelError when the template fails, loses the answer, or neither it nor the tokenizer has a token to stop at.
    """

    name: str  # "the tokenizer's chat template" or "plain", for people
    stop_token_id: int  # every trained turn ends in it; generation stops there
    has_system_role: bool

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary = UNKNOWN_BASE) -> None:
        self.tokenizer = tokenizer
        self._num_rows = vocabulary.num_rows
        self._own_tokens = frozenset(vocabulary.own_tokens)
        self.name = "the tokenizer's chat template" if tokenizer.chat_template else "plain"
        self._where = tokenizer.name_or_path or "tokenizer"
        self._refuse_size()
        self._stopped = ""  # why nothing is rendered any more
        self._limits = Limits(seconds=TEMPLATE_SECONDS, num_bytes=TEMPLATE_BYTES)
        added = tokenizer.added_tokens_decoder
        ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        # text -> id; a special token may be none of the vocabulary
        self._special = {str(tokenizer.convert_ids_to_tokens(i)): i for i in ids if i is not None}
        self._added = {token.content: i for i, token in added.items() if token.content.strip()}
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
        self._special[self._text_of(self.stop_token_id)] = self.stop_token_id
        ends = (self.stop_token_id, tokenizer.eos_token_id, *(i for i in vocabulary.stops if i in ids))
        self._ends = {self._text_of(i): int(i) for i in ends if i is not None}
        self._any_special = any_of(self._special)
        self._places: Counter[tuple[str, str]] = Counter()  # (role, key) -> messages in which the template left it out
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
        except TokenWithoutRow:
            raise
        except ModelError as error:
            raise ModelError(f"{row_in_words(conversation.id)}: {error}") from error

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Token ids to generate the next assistant turn from: the ids before that turn in training. Raises ModelError."""
        placed, _ = self._place_system([self._without_ends(message) for message in messages])
        ids = self._prompt_ids(self._render(placed, tools, generate=True) + self._before)
        self._refuse_without_row([*ids, self.stop_token_id])
        return ids

    def document(self, text: str) -> tuple[list[int], frozenset[Remark]]:
        """Token ids of plain text between the tokenizer's begin token (if it puts one) and one end token; what there is to say of it.

        Special tokens that the text spells are these tokens: it may be a conversation that a template has rendered. Where the text ends
        in an end-of-text token, or in the template's stop token, it keeps that one. Raises NothingToTrain for a text of these alone.
        """
        body, ends = self._split_ends(text)
        if ends and not body.strip():
            raise NothingToTrain("a text of nothing but stop tokens")
        ids = [*self.document_ids(body, is_finished=False), self._ends[ends[0]] if ends else self.end_token_id]
        self._refuse_without_row(ids)
        remarks = [Remark("document", token) for token in sorted(found_in(body, self._any_special))]
        return ids, frozenset([*remarks, *(Remark("ended", token) for token in ends)])

    def document_ids(self, text: str, *, is_finished: bool = True) -> list[int]:
        """The ids alone; of a text that is to be continued without its end."""
        if is_finished:
            return self.document(text)[0]
        ids, begin = self._ids(text), self._begin_ids()
        ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
        self._refuse_without_row(ids)
        return ids

    def answer_text(self, text: str) -> str:
        """An answer without the stop tokens that it ends in, as it is trained and compared."""
        return self._split_ends(text)[0]

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Special tokens that no answer says; those that one may say belong to its text."""
        return frozenset(self._spelling.tokens.values())

    @property
    def stop_token_ids(self) -> list[int]:
        """All that ends a row: the stop token of turns, the end of text, and what else the base stops at."""
        return sorted(set(self._ends.values()))

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
                raise ModelError(
                    f"{self._where}: no token stands before the answer, so nothing predicts its first token"
                )
            spans: tuple[tuple[int, int], ...] = ((start, start + len(answer_ids)),)
            if examples and prompt_ids[: len(examples[-1].encoded.input_ids)] == examples[-1].encoded.input_ids:
                spans = examples.pop().encoded.spans + spans
            encoded = Encoded([*prompt_ids, *answer_ids], spans)
            examples.append(EncodedTurns(encoded, last=turn + num_merged, remarks=frozenset(remarks)))
            self._refuse_without_row(encoded.input_ids)
        return examples

    def _remarks(self, conversation: Conversation) -> set[Remark]:
        """Stop tokens taken from the ends of answers, special tokens that stay plain characters in them, marks that prompts spell."""
        remarks: set[Remark] = set()
        for turn in conversation.trained_turns:
            message = conversation.messages[turn]
            body, ends = self._split_ends(message["content"])
            if ends and not body.strip() and all(key in ("role", "content", "weight") for key in message):
                raise NothingToTrain("an answer of nothing but stop tokens")
            said = {**message, "content": body}
            if found_in(said, self._any_special):
                spelled = found_in(said, self._spelling.pattern)
                remarks |= {Remark("guarded" if self._is_guarded(each) else "spelled", each) for each in spelled}
            remarks |= {Remark("ended", token) for token in ends}
        for index, message in enumerate(conversation.messages[: conversation.trained_turns[-1]]):
            if index not in conversation.trained_turns:
                marks = found_in(self._without_ends(message)["content"], self._any_special)
                remarks |= {Remark("prompt", mark) for mark in marks if self._is_guarded(mark)}
        return remarks

    def _left_out(self, messages: list[Message], turns: list[int], tools: Sequence[Any]) -> set[Remark]:
        """Keys of messages, such as "name", that the template has no place for; each is looked at in a conversation that ends in it."""
        found: set[Remark] = set()
        for index, message in enumerate(messages[: turns[-1] + 1]):
            keys = [key for key, value in message.items() if key not in _OURS and value]
            keys += ["content"] if message.get("tool_calls") and message["content"].strip() else []
            for key in keys:
                place = (str(message["role"]), key)
                if self._places[place] < _PROBES:
                    is_printed = self._prints_key(messages[: index + 1], key, tools, is_trained=index in turns)
                    self._places[place] = -(2**60) if is_printed else self._places[place] + 1
                if self._places[place] > 0:
                    found.add(Remark("left out", key))
        return found

    def _prints_key(self, messages: list[Message], key: str, tools: Sequence[Any], *, is_trained: bool) -> bool:
        last = messages[-1]
        without = {**last, "content": ""} if key == "content" else {k: v for k, v in last.items() if k != key}
        versions = [messages, [*messages[:-1], without]]
        try:
            if is_trained:
                one, other = (self._turn_text(version, len(messages) - 1, tools)[1] for version in versions)
            else:
                is_asked = last["role"] != "assistant"
                one, other = (self._render(version, tools, generate=is_asked) for version in versions)
        except ModelError:
            return True  # the template reads the key, or fails on the row, which rendering reports
        return one != other

    def _turn_ids(self, messages: list[Message], turn: int, tools: Sequence[Any]) -> tuple[list[int], list[int]]:
        """-> (ids to generate message `turn` from, ids of that message and its stop token)."""
        message = messages[turn]
        is_spelled = bool(found_in(message, self._any_special)) and bool(found_in(message, self._spelling.pattern))
        if is_spelled:  # tokens that the answer spells out are kept apart from those that the template prints
            kept = {key: message[key] for key in ("role", "weight") if key in message}
            message = {key: self._spelling.marked(value) for key, value in message.items()} | kept
        prompt, text = self._turn_text([*messages[:turn], message], turn, tools)
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
            raise ModelError(
                f"{self._where}: the chat template does not print a message with tool_calls after its generation prompt and "
                f"before its stop token, so it cannot be told which tokens to train. Leave such rows out, or change the template."
            )
        prompt_ids = self._prompt_ids(prompt)
        answer_ids = self._ids(text, behind=prompt, is_spelled=is_spelled)
        if self.stop_token_id in answer_ids:
            raise ModelError(
                f"{self._where}: the chat template prints its stop token {self._text_of(self.stop_token_id)} inside of an answer, so "
                f"generation would end there. Leave such rows out, or change the template."
            )
        return prompt_ids, [*answer_ids, self.stop_token_id]

    def _turn_text(self, messages: list[Message], turn: int, tools: Sequence[Any]) -> tuple[str, str]:
        """-> (text to generate message `turn` from, text of that message without its stop token)."""
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
        """A message with tool_calls where the template rewrites its prompt: its text without a system message, or ""."""
        bare = [message for message in history if message["role"] != "system"]
        prompt = self._render(bare, tools, generate=True) + self._before
        finished = self._render([*bare, message], tools, generate=False)
        is_found = finished.startswith(prompt) and finished.endswith(self._tail)
        return finished[len(prompt) : len(finished) - len(self._tail)] + self._after if is_found else ""

    def _ids(self, text: str, *, behind: str = "", is_spelled: bool = False) -> list[int]:
        """Token ids of a text, each special token in it one id; with `is_spelled`, those that spelling.py marked are spelled out.

        As in the whole text where that leaves the ids of `behind` alone, otherwise apart: SentencePiece tokenizers put a space
        before a text that begins anew.
        """
        tokenize = self._spelling.ids if is_spelled else self._tokenize
        if behind:
            first, together = tokenize(behind), tokenize(behind + text)
            if together[: len(first)] == first:
                return together[len(first) :]
        return tokenize(text)

    def _without_ends(self, message: Message) -> Message:
        """An assistant's message without the stop tokens that its content ends in."""
        if message["role"] != "assistant":
            return message
        body, ends = self._split_ends(message["content"])
        return {**message, "content": body} if ends else message

    def _split_ends(self, text: str) -> tuple[str, list[str]]:
        """-> (the text before the stop and end-of-text tokens that it ends in, these in order); [] leaves the text as it is."""
        found: list[str] = []
        left = text.rstrip()
        while end := next((token for token in self._ends if left.endswith(token)), None):
            found.insert(0, end)
            text = left.removesuffix(end)
            left = text.rstrip()
        return text, found

    @cached_property
    def _spelling(self) -> Spelling:
        """The special tokens that stay ordinary characters in an answer."""
        kept = {token: i for token, i in self._special.items() if self._is_guarded(token) or not self._is_meant(token)}
        return Spelling(self.tokenizer, kept, self._where)

    def _is_guarded(self, token: str) -> bool:
        """Whether no answer may say it: a stop, begin, end or pad token, or a marker of a role."""
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
        """The special tokens that the template prints around messages of users, systems and tools, and before those of assistants."""
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
        while first := self._any_special.match(header.lstrip()):  # a run of tokens, as far as they are no brackets
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
                    f"{self._where}: the tokenizer's token {short(token)!r} has the id {token_id}, and the base's embedding has "
                    f"{self._num_rows:,} rows (ids 0 to {self._num_rows - 1:,}), so the model cannot read it. Use the tokenizer that "
                    f"belongs to this base, or name the token in data.special_tokens: then it gets a row, which is trained"
                )

    def _text_of(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(int(token_id)))

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

    def _prompt_ids(self, text: str) -> list[int]:
        begin = [] if self.tokenizer.chat_template else self._begin_ids()  # a chat template prints its own
        return [*begin, *self._ids(text)]

    def _tokenize(self, text: str) -> list[int]:
        with foreign(lambda said: ModelError(f"{self._where}: the tokenizer cannot read a text ({said})")):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)[
                "input_ids"
            ]
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
        for stops in (self._special, self._added):  # some tokenizers do not call their stop token special
            # The first token in the text; of two that start at the same place, the longer one.
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
