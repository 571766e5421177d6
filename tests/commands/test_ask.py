"""What `ask` reads: passages and questions in any encoding."""

import io
from pathlib import Path

import pytest

from qlora_lite.commands.ask import read_context
from qlora_lite.commands.ask_lines import questions_of_stdin
from qlora_lite.errors import UserError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_passage_in_any_marked_encoding_is_the_same_passage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "passage.txt"
    path.write_bytes("It costs 10 €.\n".encode(encoding))
    assert read_context(path) == "It costs 10 €."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("10 € é".encode("cp1252"), "line 1: byte 0x80 is not UTF-8 text; probably Windows-1252"),
        ("It costs".encode("utf-16-be"), "UTF-16-BE without a byte order mark"),
        (b"x" * 4_000_001, "larger than 4,000,000 bytes"),
    ],
)
def test_a_passage_of_no_known_encoding_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "passage.txt"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_context(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_questions_of_stdin_are_decoded_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        data = io.BytesIO("How many €?\nWhy?\n".encode(encoding))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="latin-1"))
        assert list(questions_of_stdin()) == ["How many €?\n", "Why?\n"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a?\ncaf\xe9?\n")))
    with pytest.raises(UserError, match="stdin: line 2: byte 0xe9 is not UTF-8 text"):
        list(questions_of_stdin())
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="stdin, which is closed"):
        list(questions_of_stdin())
