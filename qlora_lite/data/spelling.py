"""Special tokens spelled in the data: kept as ordinary characters, while the same tokens printed by the template stay tokens.

An answer that mentions "<|im_end|>" must not put a stop token among its labels, but the template's own "<|end|>" between a thought and
its answer must be one token. So spelled tokens are marked before the template renders them, and a copy of the tokenizer with private
names for these tokens reads the rendered text: only tokens printed by the template get a private name. The text is tokenized as a
whole, so spaces and merges are the tokenizer's own.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from qlora_lite.errors import ModelError
from qlora_lite.foreign import foreign

_MARK = "\ufdd0"  # a Unicode noncharacter: never exchanged as text
_ESCAPED_MARK = "\\ufdd0"  # the mark as printed by tojson in a template


def found_in(value: Any, pattern: re.Pattern[str]) -> set[str]:
    """Return all matches of `pattern` in the texts of a JSON-like value."""
    if isinstance(value, str):
        return set(pattern.findall(value))
    inner = (
        [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    )
    return {text for item in inner for text in found_in(item, pattern)}


def any_of(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern for the texts of `tokens`; prefers the longer of two that start at the same place."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


class Spelling:
    """The tokens (text -> id) that stay ordinary characters in the data."""

    def __init__(self, tokenizer: Any, tokens: Mapping[str, int], where: str) -> None:
        self.tokens = dict(tokens)
        self.pattern = any_of(tokens)
        self._marked = re.compile(f"{_MARK}?(?:{self.pattern.pattern})|{_MARK}")
        self._tokenizer, self._where = tokenizer, where
        self._backend: Backend | None = None

    def marked(self, value: Any) -> Any:
        """Put a mark before every such token of a JSON-like value. Raises ModelError for a text that contains the mark itself."""
        if isinstance(value, str):
            if _MARK in value:
                raise ModelError("a text contains special tokens and the noncharacter U+FDD0. Remove one of the two")
            return self.pattern.sub(lambda match: _MARK + match[0], value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(inner) for key, inner in value.items()}
        return [self.marked(inner) for inner in value] if isinstance(value, list | tuple) else value

    def ids(self, text: str) -> list[int]:
        """Tokenize a rendered text: marked tokens become ordinary characters, all others stay tokens. Raises ModelError."""
        text = text.replace(_ESCAPED_MARK, _MARK)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        with foreign(lambda reason: ModelError(f"{self._where}: the tokenizer cannot read a text ({reason})")):
            if not isinstance(backend, Backend):  # a Python tokenizer has no rules to copy
                plain = text.replace(_MARK, "")
                spelled = self._tokenizer(plain, add_special_tokens=False, split_special_tokens=True, verbose=False)
                return list(spelled["input_ids"])
            self._backend = self._backend or _with_private_names(backend, self.tokens)
            return list(self._backend.encode(self._marked.sub(self._named, text), add_special_tokens=False).ids)

    def _named(self, match: re.Match[str]) -> str:
        text = match[0]
        return text[1:] if text.startswith(_MARK) else _private_name(self.tokens[text])


def _private_name(token_id: int) -> str:
    return f"{_MARK}{_MARK}{token_id}{_MARK}"


def _with_private_names(backend: Backend, tokens: Mapping[str, int]) -> Backend:
    """Copy the tokenizer with private names for `tokens`, which makes their texts ordinary characters."""
    names = {token: _private_name(token_id) for token, token_id in tokens.items()}
    rules = json.loads(backend.to_str())
    for added in rules["added_tokens"]:
        if added["content"] in names:
            added |= {"content": names[added["content"]], "normalized": False, "single_word": False}
    model = rules["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    else:  # Unigram: pieces with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    rules |= {"post_processor": None, "padding": None, "truncation": None}
    renamed: Backend = Backend.from_str(json.dumps(rules))
    whole = renamed.encode("".join(names.values()), add_special_tokens=False).ids
    if whole != list(tokens.values()):
        raise ValueError("its special tokens cannot be distinguished from text")
    return renamed
