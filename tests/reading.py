"""Readers of data files with all their settings as keywords, as tests like to change one of them."""

from dataclasses import fields
from typing import Any

from qlora_lite.data import examples, inspect
from qlora_lite.data.examples import Examples, Reading
from qlora_lite.data.inspect import DataReport
from qlora_lite.evaluation import held_out


def _apart(settings: dict[str, Any]) -> tuple[Reading, dict[str, Any]]:
    names = {field.name for field in fields(Reading)}
    reading = Reading(**{key: value for key, value in settings.items() if key in names})
    return reading, {key: value for key, value in settings.items() if key not in names}


def load_examples(source: Any, tokenizer: Any, **settings: Any) -> Examples:
    reading, others = _apart(settings)
    return examples.load_examples(source, tokenizer, reading, **others)


def inspect_rows(source: Any, tokenizer: Any, **settings: Any) -> DataReport:
    reading, others = _apart(settings)
    return inspect.inspect_rows(source, tokenizer, reading, **others)


def held_out_rows(file: Any, tokenizer: Any, **settings: Any) -> Examples:
    reading, others = _apart(settings)
    return held_out.held_out_rows(file, tokenizer, reading, **others)
