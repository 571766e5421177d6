"""Interruptions: the signals that request a stop, and the command that continues."""

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.errors import Interrupted
from qlora_lite.runs.folder import RunDir, in_command


@contextmanager
def told_how_to_go_on(run: RunDir, command: str) -> Iterator[None]:
    """On an immediate stop (while loading or scoring, or by a second signal), raise Interrupted with the command that continues."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        has_begun = run.recipe.is_file()
        message = f"stopped; {'continue with:' if has_begun else 'nothing was trained yet. Start again with:'}\n  "
        message += command if has_begun else command.removesuffix(" --resume")
        raise Interrupted(message, exit_code=_code_of(stop)) from stop


class _Stop:
    number: int | None = None  # of the signal that requested a stop


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP (the terminal is gone) only sets `number`; a second one stops at once."""
    stop = _Stop()
    handled = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in handled}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup

    def remember(number: int, frame: Any) -> None:
        if stop.number is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        stop.number = number
        show.say_warning("finishing this step and writing a checkpoint; once more to stop at once")

    for number in before:
        signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def told_how_to_fetch_on(command: str) -> Iterator[None]:
    """The same for a download."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        message = f"stopped; the partial download is kept. Continue with:\n  {command}"
        raise Interrupted(message, exit_code=_code_of(stop)) from stop


def _code_of(stop: KeyboardInterrupt | SystemExit) -> int:
    """128 plus the number of the signal."""
    if isinstance(stop, KeyboardInterrupt):
        return 130
    return stop.code if isinstance(stop.code, int) and stop.code > 128 else 143


def resume_command(recipe_name: str, overrides: Sequence[str], run_dir: Path) -> str:
    """The shell command that continues a run."""
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["qlora-lite", "train", recipe_name, *sets, "--run-dir", in_command(run_dir), "--resume"])
