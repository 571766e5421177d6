"""The screen of a run, on a terminal and in a log."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from qlora_lite import show
from qlora_lite.show import phases, screen, tables, text


@dataclass(frozen=True)
class Stats:
    step: int
    num_steps: int = 4
    epoch: float = 0.5
    loss: float = 2.0
    learning_rate: float = 2e-4
    grad_norm: float = 1.0
    num_examples: int = 8
    num_tokens: int = 800
    num_label_tokens: int = 40
    step_s: float = 2.0
    rss_bytes: int = 2**30
    other_cores: float | None = None
    peak_bytes: int | None = None
    eval_loss: float | None = None


@pytest.fixture
def written(monkeypatch):
    """-> a function that makes our console a terminal or not, and returns the stream it writes to."""

    def make(*, terminal: bool) -> io.StringIO:
        stream = io.StringIO()
        fake = Console(file=stream, force_terminal=terminal, markup=False, highlight=False, emoji=False, width=200)
        for module in (text, phases, screen, tables):
            monkeypatch.setattr(module, "console", lambda: fake)
        return stream

    return make


def test_a_log_gets_the_first_and_the_last_step_and_no_cursor_moves(written):
    stream = written(terminal=False)
    with show.TrainScreen(4, line_every_s=1000) as train_screen:
        for step in range(1, 5):
            train_screen.update(Stats(step))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 4/4"]
    assert "\x1b" not in stream.getvalue()
    assert "loss 2.000  20 label tokens/s  4.00 examples/s  6.0 s left  1 GiB, peak 1 GiB" in lines[0]


def test_the_loss_shown_is_weighted_by_label_tokens(written):
    stream = written(terminal=False)
    with show.TrainScreen(2, line_every_s=1000) as train_screen:
        train_screen.update(Stats(1, num_steps=2, loss=1.0, num_label_tokens=30))
        train_screen.update(Stats(2, num_steps=2, loss=3.0, num_label_tokens=10))
    assert "loss 1.500" in stream.getvalue().splitlines()[-1]


def test_two_memory_meters_are_named(written):
    stream = written(terminal=False)
    with show.TrainScreen(1) as train_screen:
        train_screen.update(Stats(1, num_steps=1, peak_bytes=2**29))
    assert "process 1 GiB, allocator peak 512 MiB" in stream.getvalue()


def test_a_step_with_a_validation_loss_always_gets_a_line(written):
    stream = written(terminal=False)
    with show.TrainScreen(9, line_every_s=1000) as train_screen:
        for step in range(1, 6):
            train_screen.update(Stats(step, num_steps=9, eval_loss=1.25 if step == 3 else None))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/9", "step 3/9"]
    assert lines[0].endswith("learning rate 2.0e-04  gradient norm 1.00")
    assert lines[1].endswith("gradient norm 1.00  validation loss 1.250 after step 3")


def test_a_terminal_shows_learning_rate_gradient_norm_and_the_newest_validation_loss(written):
    stream = written(terminal=True)
    with show.TrainScreen(2) as train_screen:
        train_screen.update(Stats(1, num_steps=2, eval_loss=1.25))
        train_screen.update(Stats(2, num_steps=2))
    last = stream.getvalue().rsplit("loss 2.000", 1)[1]
    assert "learning rate 2.0e-04  gradient norm 1.00  validation loss 1.250 after step 1" in last


def test_a_terminal_gets_a_bar_and_a_phase_may_run_inside_it(written):
    stream = written(terminal=True)
    with show.TrainScreen(2) as train_screen:
        train_screen.update(Stats(1, num_steps=2))
        with show.phase("evaluating") as current:
            current.note("8 questions")
        train_screen.update(Stats(2, num_steps=2))
    assert "2/2" in stream.getvalue()
    assert "evaluating: 0.0 s (8 questions)" in stream.getvalue()


def test_a_phase_that_fails_says_so_and_raises_on(written):
    stream = written(terminal=False)
    with pytest.raises(KeyError), show.phase("loading the base"):
        raise KeyError("x")
    assert stream.getvalue().splitlines() == ["loading the base ...", "loading the base: failed after 0.0 s"]


def test_a_busy_machine_is_named_beside_the_speed_that_it_spoils(written, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    stream = written(terminal=False)
    with show.TrainScreen(2, line_every_s=0) as train_screen:
        train_screen.update(Stats(1, num_steps=2, other_cores=0.1))
        train_screen.update(Stats(2, num_steps=2, other_cores=1.9))
    first, last = stream.getvalue().splitlines()
    assert "busy" not in first and "busy: other programs take 1.0 of 2 cores" in last
