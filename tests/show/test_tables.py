"""The tables say what they were given, with the arithmetic right."""

from dataclasses import dataclass

import pytest

from qlora_lite import show
from qlora_lite.show.tables import mark_trained, proof_rows, savings, score_rows


@pytest.fixture(autouse=True)
def fresh_console():
    show.console.cache_clear()
    yield
    show.console.cache_clear()


def test_memory_shows_each_part_beside_the_other_method_and_what_is_saved(capsys):
    show.show_memory(
        {
            "QLoRA, measured": {"weights_bytes": 2**30},
            "full": {"weights_bytes": 4 * 2**30, "gradients_bytes": 4 * 2**30},
        },
        totals={"QLoRA, measured": 2 * 2**30, "full": 8 * 2**30},
    )
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["weights", "1", "GiB", "4", "GiB"] in lines
    assert ["gradients", "–", "4", "GiB"] in lines
    assert ["total", "2", "GiB", "8", "GiB"] in lines
    assert "saves 6 GiB (75%) against full".split() in lines


def test_nothing_is_saved_against_nothing():
    assert savings({"QLoRA": 5}, ["QLoRA"]) == ""
    assert savings({"QLoRA": 5}, ["QLoRA", "full"]) == ""


def test_scores_show_before_after_and_change():
    assert score_rows({"exact_match": 6.0, "f1": 28.14, "loss": 2.3}, {"exact_match": 49.0, "f1": 66.21}) == [
        ("exact match", "6.0", "49.0", "+43.0"),
        ("F1", "28.1", "66.2", "+38.1"),
        ("loss", "2.300", "–", "–"),
    ]


def test_groups_of_questions_have_lines_of_their_own(capsys):
    show.show_scores(
        {"f1": 1.0}, {"f1": 2.0}, groups={"untrained phrasing": {"before": {"f1": 3.0}, "after": {"f1": 2.5}}}
    )
    assert "untrained phrasing: F1 3.0 2.5 -0.5".split() in [
        line.split() for line in capsys.readouterr().err.splitlines()
    ]


def test_trained_tokens_stand_between_marks_where_there_is_no_colour():
    pieces = [("<user>Q\n", False), ("an", True), ("swer<end>", True), ("\n", False), ("x", True)]
    assert mark_trained(pieces, with_colour=False).plain == "<user>Q\n«answer<end>»\n«x»"
    assert mark_trained(pieces, with_colour=True).plain == "<user>Q\nanswer<end>\nx"


@dataclass(frozen=True)
class Line:
    max_seq_length: int
    num_refused: int


def test_truncation_lines_may_be_dataclasses_or_mappings(capsys):
    show.show_truncation([Line(1024, 3)])
    show.show_truncation([{"max_seq_length": 1024, "num_refused": 3}])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines.count(["1,024", "3"]) == 2


def test_a_proof_shows_the_fields_that_are_there():
    rows = proof_rows(
        {"adapter_effect": 0.5, "arithmetic_ratio": 0.00012, "storage_ratio": None, "peak_host_bytes": 2**30}
    )
    assert [(label, value) for label, value, _ in rows] == [
        ("adapter's effect", "0.5"),
        ("arithmetic error", "0.012%"),
        ("peak memory, merge", "1 GiB"),
    ]


def test_answers_stand_side_by_side_and_a_streamed_one_is_returned_whole(capsys):
    show.show_answers({"base": "It may be Oslo.", "adapter": "Oslo", "merged": None}, question="Which\ncity?")
    assert show.stream_answer("adapter", ["Os", "lo\x1b[2J"]) == "Oslo\x1b[2J"
    printed = capsys.readouterr()
    assert "not there" in printed.err and "Which city?" in printed.err
    assert printed.err.endswith("adapter: Oslo\n")
    assert printed.out == ""
