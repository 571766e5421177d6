"""A row fitted into `max_seq_length` tokens: one example, several, or none.

- A question loses only *context*, first the longer side around the answer; never question, answer or template.
- A conversation is kept complete or dropped. It is one example, or one per stretch of turns that the template does not rewrite.
- A document is cut in pieces. Each begins with the last token of the previous piece, without a label there, so every token is trained
  once; only the last piece ends in the end-of-sequence token.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from qlora_lite.data.prompts import squad_text
from qlora_lite.data.read import NUM_NAMED, Mix, too_many_bad
from qlora_lite.data.rows import Conversation, Document, Message, QuestionRow, Row, short
from qlora_lite.data.template import ChatTemplate, Encoded, EncodedTurns, NothingToTrain, Remark, TokenWithoutRow
from qlora_lite.errors import DataError, ModelError
from qlora_lite.units import row_in_words

_SNAP_CHARS = 24  # a shortened context moves to a word boundary within this distance


@dataclass(frozen=True)
class Example:
    """Token ids for training, and question and answers for evaluation."""

    id: str  # of its row
    encoded: Encoded
    question: str = ""  # the last message before the answer, for display
    answers: tuple[str, ...] | None = (
        None  # gold answers of the last trained turn; None: no answers to compare (text, a call)
    )
    whole_prompt_ids: tuple[int, ...] | None = None  # if `encoded` lost context: the prompt with the full context
    is_squad: bool = False  # a question about a passage: its answers are compared by SQuAD's rule
    remarks: frozenset[Remark] = field(default=frozenset(), compare=False)  # on its row, for the notes; not stored

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids from which to generate the last trained turn, always with the full context."""
        if self.whole_prompt_ids is not None:
            return list(self.whole_prompt_ids)
        return self.encoded.input_ids[: self.encoded.spans[-1][0]]


def fit_row(
    template: ChatTemplate, row: Row, *, no_answer_text: str, max_seq_length: int | None, may_cut: bool = True
) -> tuple[list[Example], bool]:
    """Fit a row -> (examples of at most `max_seq_length` tokens, whether a context was shortened or a text cut in pieces).

    With `may_cut` false, no context is shortened. Returns no examples for a row that cannot fit. Raises ModelError for a row that the
    template cannot render.
    """
    if isinstance(row, Document):
        return _fit_document(template, row, max_seq_length)
    if isinstance(row, QuestionRow):
        return _fit_question(template, row, no_answer_text, max_seq_length, may_cut)
    examples = _turn_examples(template, row)
    fits = max_seq_length is None or max(len(example.encoded.input_ids) for example in examples) <= max_seq_length
    return (examples if fits else []), False


def least_tokens(template: ChatTemplate, row: Row, whole: int, *, no_answer_text: str) -> int:
    """Return the smallest `max_seq_length` at which a row of `whole` tokens is not dropped."""
    if isinstance(row, Document):
        return 2  # one trained token, and the token before it
    if isinstance(row, QuestionRow):
        shortest = replace(row, context=row.answers[0] if row.answers else "")
        return min(whole, len(_encode_question(template, shortest, no_answer_text).encoded.input_ids))
    return whole


class RowFitter:
    """Applies `fit_row` to the rows of a `Mix`, and collects bad rows: those of the files and those that the template cannot render."""

    def __init__(
        self,
        mix: Mix,
        template: ChatTemplate,
        *,
        no_answer_text: str,
        max_seq_length: int | None,
        max_bad_share: float,
        may_cut: bool = True,
    ) -> None:
        self.mix = mix
        self.template = template
        self.no_answer_text = no_answer_text
        self.max_seq_length = max_seq_length
        self.max_bad_share = max_bad_share
        self.may_cut = may_cut
        self.num_unrendered = 0
        self._unrendered: dict[str, None] = {}  # named, with the reason; a row taken twice is named once

    def fit(self, row: Row) -> tuple[list[Example], bool] | None:
        """As `fit_row`; None for a row that the template cannot render."""
        try:
            return fit_row(
                self.template,
                row,
                no_answer_text=self.no_answer_text,
                max_seq_length=self.max_seq_length,
                may_cut=self.may_cut,
            )
        except TokenWithoutRow:
            raise  # the tokenizer belongs to another base; the row is fine
        except ModelError as error:
            if isinstance(row, Document) and not isinstance(error, NothingToTrain):
                raise  # documents use no template: the tokenizer is at fault, for every row
            self.num_unrendered += 1
            if len(self._unrendered) < NUM_NAMED:
                self._unrendered[str(error)] = None
            return None

    def refuse_too_many(self) -> None:
        """After the last row: raise DataError if the template cannot render more than `max_bad_share` of the rows taken."""
        num_taken = self.mix.num_rows
        if self.num_unrendered > self.max_bad_share * num_taken:
            num_rows, named = num_taken - self.num_unrendered, list(self._unrendered)
            raise DataError(too_many_bad(self.mix.names, num_rows, self.num_unrendered, named, self.max_bad_share))

    @property
    def num_bad(self) -> int:
        """Unusable rows in the whole files, and those of the rows taken that the template cannot render."""
        return self.mix.num_bad + self.num_unrendered

    @property
    def bad(self) -> tuple[str, ...]:
        """The first bad rows, named, with reasons."""
        return (*self.mix.bad, *self._unrendered)[:NUM_NAMED]


@dataclass
class TemplateNotes:
    """Counts the rows changed or split because of the chat template or special tokens, for the notes."""

    num_merged: int = 0
    num_split: int = 0
    remarks: Counter[Remark] = field(default_factory=Counter)  # -> rows
    kinds: Counter[str] = field(default_factory=Counter)  # kind of a remark -> rows

    def count(self, template: ChatTemplate, row: Row, examples: list[Example]) -> None:
        """Count one row and its examples."""
        if isinstance(row, Conversation):
            self.num_split += len(examples) > 1
            self.num_merged += row.messages[0]["role"] == "system" and not template.has_system_role
        remarks = {remark for example in examples for remark in example.remarks}
        self.remarks.update(remarks)
        self.kinds.update({remark.kind for remark in remarks})

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes; empty if no row was changed."""
        notes = []
        if self.num_merged:
            notes.append(
                f"the chat template has no system role: the system text of {self.num_merged} conversations was put before "
                f"their first user message"
            )
        if self.num_split:
            notes.append(
                f"the chat template rewrites earlier turns: {self.num_split} conversations make several examples each, so every "
                f"trained turn follows the same tokens as at inference"
            )
        for kind, sentence in _SENTENCES.items():
            if self.kinds[kind]:
                notes.append(sentence.format(rows=_rows(self.kinds[kind]), tokens=", ".join(self._about(kind))))
        for key in self._about("left out"):
            num_rows = self.remarks[Remark("left out", key)]
            notes.append(f'the chat template ignores "{short(key)}" in messages: {_rows(num_rows)} lost it')
        return tuple(notes)

    def _about(self, kind: str) -> list[str]:
        return sorted(remark.about for remark in self.remarks if remark.kind == kind)


_SENTENCES = {
    "ended": "{rows} already ended in a stop token ({tokens}): each is trained with exactly one",
    "guarded": "{rows} spell reserved special tokens inside an answer ({tokens}): they stay ordinary characters",
    "spelled": "{rows} spell special tokens inside an answer that neither the chat template nor data.special_tokens names ({tokens}): "
    "they stay ordinary characters; to train them as tokens, name them in data.special_tokens",
    "prompt": "{rows} spell stop tokens or role markers inside a prompt ({tokens}): each is read as that token. If the prompts are "
    "conversations already rendered by a template, the template wraps them again: give their turns as messages, or the whole as text",
    "document": "{rows} of text spell special tokens ({tokens}): each is read as that token",
}


def _rows(num_rows: int) -> str:
    return "1 row" if num_rows == 1 else f"{num_rows:,} rows"


def _turn_examples(template: ChatTemplate, row: Conversation) -> list[Example]:
    return [
        Example(
            row.id,
            turns.encoded,
            question=_said(row.messages[turns.last - 1]),
            answers=None
            if "tool_calls" in row.messages[turns.last]
            else (template.answer_text(_said(row.messages[turns.last])).strip(),),
            remarks=turns.remarks,
        )
        for turns in template.encode(row)
    ]


def _said(message: Message) -> str:
    return str(message.get("content", "")).strip()


def _fit_document(template: ChatTemplate, row: Document, max_seq_length: int | None) -> tuple[list[Example], bool]:
    try:
        ids, remarks = template.document(row.text)
    except NothingToTrain as error:
        raise NothingToTrain(f"{row_in_words(row.id)}: {error}") from error
    length = max_seq_length or len(ids)
    if length < 2:
        return [], False
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    return [Example(row.id, Encoded(piece, ((1, len(piece)),)), remarks=remarks) for piece in pieces], len(pieces) > 1


def _fit_question(
    template: ChatTemplate, row: QuestionRow, no_answer_text: str, max_seq_length: int | None, may_cut: bool
) -> tuple[list[Example], bool]:
    whole = _encode_question(template, row, no_answer_text)
    ids, remarks = whole.encoded.input_ids, whole.remarks
    golds = tuple(template.answer_text(answer) for answer in row.answers)
    if max_seq_length is None or len(ids) <= max_seq_length:
        return [Example(row.id, whole.encoded, row.question, golds, is_squad=True, remarks=remarks)], False
    shortened = _shorten(template, row, no_answer_text, max_seq_length) if may_cut else None
    if shortened is None:
        return [], False
    whole_prompt_ids = tuple(ids[: whole.encoded.spans[-1][0]])
    return [Example(row.id, shortened, row.question, golds, whole_prompt_ids, is_squad=True, remarks=remarks)], True


def _encode_question(template: ChatTemplate, row: QuestionRow, no_answer_text: str) -> EncodedTurns:
    """Prompt, first gold answer (`no_answer_text` for an unanswerable row) and stop token."""
    answer = row.answers[0] if row.answers else no_answer_text
    asked = {"role": "user", "content": squad_text(row.question, row.context)}
    answered = {"role": "assistant", "content": answer.strip()}
    (turn,) = template.encode(Conversation(row.id, (asked, answered)))
    return turn


def _shorten(template: ChatTemplate, row: QuestionRow, no_answer_text: str, max_seq_length: int) -> Encoded | None:
    """Encode the row with the largest window of its context that fits; None if none fits.

    The window contains the first gold answer and is cut first on the longer side.
    """
    answer = row.answers[0] if row.answers else ""
    start = row.answer_start if row.answer_start is not None else max(0, row.context.find(answer))
    end = start + len(answer)
    best: Encoded | None = None
    # Binary search for the most characters that fit; tokens nearly always grow with characters.
    low, high = len(answer), len(row.context) - 1
    while low <= high:
        num_chars = (low + high) // 2
        shorter = replace(row, context=_window(row.context, start, end, num_chars))
        encoded = _encode_question(template, shorter, no_answer_text).encoded
        if len(encoded.input_ids) <= max_seq_length:
            best, low = encoded, num_chars + 1
        else:
            high = num_chars - 1
    return best


def _window(context: str, start: int, end: int, num_chars: int) -> str:
    """Cut `context` to at most `num_chars` characters around [start, end): the longer side first, at nearby word boundaries."""
    spare = num_chars - (end - start)
    before, after = start, len(context) - end  # characters on each side of the answer
    keep_before = min(before, max(spare // 2, spare - after))
    keep_after = min(after, spare - keep_before)
    left, right = start - keep_before, end + keep_after
    if left > 0 and not context[left - 1].isspace():
        left = next((i for i in range(left, min(left + _SNAP_CHARS, start)) if context[i].isspace()), left)
    if right < len(context) and not context[right].isspace():
        right = next((i for i in range(right, max(right - _SNAP_CHARS, end), -1) if context[i - 1].isspace()), right)
    # Trim whitespace at a cut, but never a character of the answer.
    while left < start and left > 0 and context[left].isspace():
        left += 1
    while right > end and right < len(context) and context[right - 1].isspace():
        right -= 1
    return context[left:right]
