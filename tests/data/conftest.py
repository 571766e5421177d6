"""A tiny tokenizer and small SQuAD files, all built in code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_tokenizer import make_tokenizer

CONTEXT = (
    "The Nile flows through Egypt. Cairo lies on its banks, and so does Luxor. Farmers have used its floods for ages."
)


def question(name: str, text: str, *answers: str, context: str = CONTEXT) -> dict[str, Any]:
    golds = [{"text": answer, "answer_start": context.find(answer)} for answer in answers]
    return {"id": name, "question": text, "answers": golds, "is_impossible": not golds}


def squad(*questions: Any, context: Any = CONTEXT) -> dict[str, Any]:
    return {
        "version": "v2.0",
        "data": [{"title": "Nile", "paragraphs": [{"context": context, "qas": list(questions)}]}],
    }


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a document (or bytes, or text) to a file and return its path."""

    def write_file(document: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        if not isinstance(document, bytes):
            document = (document if isinstance(document, str) else json.dumps(document)).encode()
        path.write_bytes(document)
        return path

    return write_file
