"""What reaches the screen and stdout is safe and, for JSON, readable by a strict reader."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_lite import show
from qlora_lite.show.text import plain


@pytest.fixture(autouse=True)
def fresh_console():
    """The console looks once whether it has a terminal; each test brings its own stderr."""
    show.console.cache_clear()
    yield
    show.console.cache_clear()


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;new title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("a\x1bcb", "ab"),
        ("bell\x07 back\x08 nul\x00 del\x7f", "bell back nul del"),
        ("over\rwritten", "overwritten"),
        ("line\r\nline\n\ttab", "line\nline\n\ttab"),
        ("abc\u202edcb", "abcdcb"),
        ("lone \ud800", "lone ?"),
        ("[red]markup[/red] :smile:", "[red]markup[/red] :smile:"),
        ("Zürich 東京 العربية", "Zürich 東京 العربية"),
    ],
)
def test_terminal_escapes_and_controls_are_stripped_and_words_are_not(dirty, clean):
    assert show.safe_text(dirty) == clean


def test_one_line_is_one_line():
    assert show.safe_text("a\n\n  b\tc", one_line=True) == "a b c"


def test_markup_of_data_is_shown_and_not_obeyed(capsys):
    show.say("[red]x[/red] [/nonsense] :smile: \x1b[2J")
    show.show_table("[b]t", ["[i]c"], [["[u]cell\x1b[2J"]])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "[red]x[/red] [/nonsense] :smile:" in printed.err
    assert all(word in printed.err for word in ("[b]t", "[i]c", "[u]cell"))
    assert "\x1b" not in printed.err


def test_a_long_message_stays_one_line_in_a_log(capsys):
    show.say_error("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


@dataclass(frozen=True)
class Scores:
    f1: float
    path: Path


def test_json_is_one_strict_document_on_stdout(capsys):
    show.print_json(
        {"loss": float("nan"), "up": float("inf"), "rows": (1, 2), "scores": Scores(50.0, Path("a/b")), "é": "\ud800"}
    )
    out = capsys.readouterr().out
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert out.count("\n") == 1
    assert document == {
        "schema_version": 1,
        "loss": None,
        "up": None,
        "rows": [1, 2],
        "scores": {"f1": 50.0, "path": "a/b"},
        "é": "\ud800",
    }


def test_a_thing_without_a_json_form_is_refused():
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"x": object()})
