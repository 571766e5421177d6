"""The tables say what they were given, with the arithmetic right."""

from dataclasses import dataclass

import pytest

from qlora_lite import show
from qlora_lite.show.rows import proof_rows, savings, score_rows
from qlora_lite.show.tables import mark_trained
from tests.show.run_files import GIB, make_plan


@pytest.fixture(autouse=True)
def fresh_console():
    show.console.cache_clear()
    yield
    show.console.cache_clear()


def printed_lines(capsys):
    return [line.split() for line in capsys.readouterr().err.splitlines()]


def test_memory_shows_planned_beside_measured_part_by_part_and_phase_by_phase(capsys):
    show.show_memory(
        {
            "peak_bytes": {"planned": 3 * GIB, "measured": 2 * GIB},
            "parts": {
                "logits_bytes": {"planned": GIB, "measured": None, "difference": None},
                "weights_bytes": {"planned": GIB, "measured": GIB + 2**20, "difference": 2**20},
                "runtime_bytes": {"planned": 0, "measured": 0, "difference": 0},
            },
            "phases": {"forward": {"planned": 2 * GIB, "measured": GIB, "difference": -GIB}},
            "retries": ["half the micro-batch"],
        }
    )
    lines = printed_lines(capsys)
    weights, logits = "weights 1 GiB 1 GiB +1 MiB".split(), "logits 1 GiB – –".split()
    assert lines.index(weights) < lines.index(logits)  # in the order of the plan, whatever the file's is
    assert "peak 3 GiB 2 GiB -1 GiB".split() in lines
    assert "forward 2 GiB 1 GiB -1 GiB".split() in lines
    assert "warning: retried: half the micro-batch".split() in lines
    assert not any("runtime" in line for line in lines)


def test_a_run_without_a_measurement_shows_no_memory(capsys):
    show.show_memory({})
    assert capsys.readouterr().err == ""


def test_a_plan_shows_its_methods_side_by_side_what_fits_and_what_is_saved(capsys):
    show.show_plan(make_plan())
    lines = printed_lines(capsys)
    for expected in (
        "optimizer 20 MiB 20 MiB 513 MiB 1.25 GiB",
        "(may page to the host) – – 513 MiB –",
        "peak 368 MiB 514 MiB 1.68 GiB 2.43 GiB",
        "QLoRA saves 2.07 GiB (85%) against full",
        "adapter, for use 9 MiB 90 MiB",
        "512 209 MiB 258 MiB 355 MiB 551 MiB 941 MiB",
        "2,048 355 MiB 551 MiB 941 MiB 1.68 GiB 3.21 GiB x",
        "memory.gradient_checkpointing: on 300 MiB 368 MiB",
    ):
        assert expected.split() in lines, expected


def test_a_method_that_fits_nothing_says_so(capsys):
    plan = make_plan()
    plan["methods"]["full"] |= {"max_seq_length": None, "largest_model": None}
    plan["methods"]["lora"]["largest_model"] = "llama-3.1-8b"
    show.show_plan(plan)
    lines = printed_lines(capsys)
    assert "full none fits none fits".split() in lines
    assert any(line[:1] == ["LoRA"] and line[-1] == "llama-3.1-8b" for line in lines)


def test_time_that_no_phase_accounts_for_is_shown(capsys):
    show.show_time({"training": 30.0, "scoring": 10.0}, wall_s=50.0)
    lines = printed_lines(capsys)
    assert [line for line in lines if line and line[-1].endswith("%")] == [
        ["training", "30", "s", "60%"],
        ["scoring", "10", "s", "20%"],
        ["everything", "else", "10", "s", "20%"],
        ["total", "50", "s", "100%"],
    ]


@pytest.mark.parametrize("theirs", [None, 0, 5, 4])
def test_nothing_is_saved_against_nothing(theirs):
    assert savings(5, theirs) == ""


def test_savings_are_in_bytes_and_in_percent():
    assert savings(GIB, 4 * GIB) == "3 GiB (75%)"


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
    assert "no such model" in printed.err and "Which city?" in printed.err
    assert printed.err.endswith("adapter: Oslo\n")
    assert printed.out == ""
