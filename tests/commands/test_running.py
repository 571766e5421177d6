"""Parts of the verbs without a model: answers of before beside those of after, passages and questions in any encoding."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.commands import pipeline, running
from qlora_lite.errors import UserError
from qlora_lite.evaluation.scores import EvalResult, Prediction


def predictions(*named: tuple[str, str, str]) -> tuple[Prediction, ...]:
    return tuple(Prediction(name, question, answer, ("x",), 0.0, 0.0) for name, question, answer in named)


def test_two_rows_of_one_id_keep_their_own_answers_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("7", "a?"), ("7", "b?"), ("7", "a?"), ("8", "a?"), ("7", "a?")]
    before = [
        {"id": name, "question": question, "base_prediction": f"before {i}"} for i, (name, question) in enumerate(rows)
    ]
    after = predictions(
        *((name, question, f"after {i}") for i, (name, question) in enumerate(rows)), ("9", "new?", "after 5")
    )
    written: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(
        write_json=lambda name, facts: None,
        read_predictions=lambda: before,
        write_predictions=lambda lines: written.extend(lines),
    )
    monkeypatch.setattr(running, "score", lambda *args, **more: EvalResult(0.0, 0.0, 1.0, len(after), after))
    monkeypatch.setattr(running.show, "show_scores", lambda *args, **more: None)
    plan: Any = None
    running.scores_after(plan, plan, run, {"before": None, "after": None, "groups": {}}, {})
    joined = [(line["prediction"], line["base_prediction"]) for line in written]
    assert joined == [*((f"after {i}", f"before {i}") for i in range(5)), ("after 5", None)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_passage_in_any_marked_encoding_is_the_same_passage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "passage.txt"
    path.write_bytes("It costs 10 €.\n".encode(encoding))
    assert pipeline.read_context(path) == "It costs 10 €."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("10 € é".encode("cp1252"), "line 1: byte 0x80 is not UTF-8 text; in Windows-1252"),
        ("It costs".encode("utf-16-be"), "UTF-16-BE without a byte order mark"),
        (b"x" * 4_000_001, "larger than 4,000,000 bytes"),
    ],
)
def test_a_passage_of_no_known_encoding_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "passage.txt"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        pipeline.read_context(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_questions_of_stdin_are_decoded_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        data = io.BytesIO("How many €?\nWhy?\n".encode(encoding))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="latin-1"))
        assert list(pipeline.questions_of_stdin()) == ["How many €?\n", "Why?\n"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a?\ncaf\xe9?\n")))
    with pytest.raises(UserError, match="stdin: line 2: byte 0xe9 is not UTF-8 text"):
        list(pipeline.questions_of_stdin())
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="stdin, which is closed"):
        list(pipeline.questions_of_stdin())
