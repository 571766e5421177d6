"""Flags on the turns of a conversation that exclude turns from training, and notes on ineffective flags.

In: the keys of a turn. Out: whether it is left out of training, and notes on keys that look like a flag but are not one.

| key                                | written by                                          | left out at     |
|------------------------------------|-----------------------------------------------------|-----------------|
| weight                             | the OpenAI format                                   | 0               |
| train, training, train_on_turn     | axolotl (`message_field_training` names it)         | false           |
| trainable, learn                   | users' own scripts                                  | false           |
| loss                               | ChatGLM3; proposed for LLaMA-Factory (#10471)       | false           |
| masked                             | torchtune                                           | true            |
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qlora_lite.data.rows import short
from qlora_lite.files.json_text import parse_json

_LEFT_OUT_AT = {
    "weight": False,
    "train": False,
    "training": False,
    "train_on_turn": False,
    "trainable": False,
    "learn": False,
    "loss": False,
    "masked": True,
}
FLAGS = tuple(_LEFT_OUT_AT)
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_LOOKS_LIKE_ONE = re.compile(r"train|learn|mask|loss|weight|superv|label|ignore", re.IGNORECASE)
_TALKS = {"messages": "role", "conversations": "from", "prompt": "role", "completion": "role"}  # column -> who speaks
_MODEL = ("assistant", "gpt", "chatgpt", "model", "function_call")


class WrongFlag(ValueError):
    """A flag with an invalid value, or two contradicting flags."""


def is_untrained(flags: Mapping[str, Any], where: str) -> bool:
    """Whether these flags of a turn leave it out of training. Raises WrongFlag."""
    left_out_by: dict[str, bool] = {}
    for key, given in flags.items():
        if given is None or (isinstance(given, str) and not given.strip()):
            continue
        value = _WORDS.get(str(int(given) if given in (0, 1) else given).strip().lower())
        if value is None:
            left_out, kept = ("true", "false") if _LEFT_OUT_AT[key] else ("0", "1")
            raise WrongFlag(
                f"{where}.{key}: expected {kept}, or {left_out} for a message that is not trained, got {short(str(given))}"
            )
        left_out_by[key] = value == _LEFT_OUT_AT[key]
    if len(set(left_out_by.values())) > 1:
        raise WrongFlag(f"{where}: {' and '.join(left_out_by)} contradict each other: keep one of them")
    return any(left_out_by.values())


class FlagNotes:
    """Counts flags and similar keys in the turns of a file, for the notes."""

    def __init__(self) -> None:
        self._num_left_out: Counter[str] = Counter()  # by key
        self._num_not_model: Counter[str] = (
            Counter()
        )  # turns of other speakers than the model marked for training, by key
        self._unknown: Counter[str] = Counter()

    def count(self, values: Mapping[str, Any]) -> None:
        """Count the flags of one row."""
        for column, speaker in _TALKS.items():
            turns = _as_list(values.get(column))
            for turn in turns:
                if isinstance(turn, dict):
                    self._count(turn, str(turn.get(speaker)))

    def _count(self, turn: Mapping[str, Any], speaker: str) -> None:
        for key in turn:
            if key not in _LEFT_OUT_AT:
                if _LOOKS_LIKE_ONE.search(key) and (key in self._unknown or len(self._unknown) < 20):
                    self._unknown[key] += 1
                continue
            try:
                is_left_out = is_untrained({key: turn[key]}, "")
            except WrongFlag:
                continue
            if is_left_out and speaker in _MODEL:
                self._num_left_out[key] += 1
            elif turn[key] is not None and not is_left_out and speaker not in _MODEL:
                self._num_not_model[key] += 1

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes; empty if no turn has an effective flag or a key that looks like one."""
        notes = [f'turns not trained because of "{key}": {num:,}' for key, num in self._num_left_out.items()]
        notes += [
            f'turns of other roles than the model marked for training by "{key}": {num:,}; only the model\'s turns are trained'
            for key, num in self._num_not_model.items()
        ]
        notes += [
            f'turns with the key "{short(key)}": {num:,}; it is not a flag. "train": false leaves a turn out of training'
            for key, num in self._unknown.items()
        ]
        return tuple(notes)


def _as_list(turns: Any) -> list[Any]:
    """Return `turns` as a list, parsing the JSON of a csv cell."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = parse_json(turns)
        except ValueError:  # a bad row, reported elsewhere
            return []
    return turns if isinstance(turns, list) else []
