"""`ask -`: a question a line from stdin, answered by one loaded base; `/use NAME:WEIGHT` weighs adapters."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.ask import answer
from qlora_lite.errors import UserError
from qlora_lite.files.text_file import NotText, text_lines
from qlora_lite.runs.adapters import Asked, Blend, parse_part, parts_of


def questions_of_stdin() -> Iterator[str]:
    """The lines of stdin, each as soon as it is there. Raises UserError for bytes that are not text, and where stdin is closed."""
    if sys.stdin is None:
        raise UserError("ask: - reads the questions from stdin, which is closed. Give the question as an argument")
    try:
        # A program that calls us may have put text in place of bytes.
        yield from text_lines(sys.stdin.buffer) if hasattr(sys.stdin, "buffer") else sys.stdin
    except NotText as error:
        raise UserError(f"stdin: line {error.line}: {error}") from error


def ask_lines(
    run_dir: Path, lines: Iterable[str], parts: Sequence[str], *, passage: str | None, base: Path | None = None
) -> dict[str, Any]:
    """Answer each line with one loaded base. A line `/use NAME:WEIGHT ...` weighs the adapters from there on, by their folders' names.

    Without `parts` the run's own adapter is the only one; at first each counts as `parts` says. A `/use` that cannot be understood is
    said and changes nothing. Raises UserError, ModelError, RunError.
    """
    run, plan = api.open_run(run_dir, base=base)
    api.run_base(plan, run)
    asked = [parse_part(part) for part in parts] or [Asked(run_dir, 1.0, {})]
    if any(each.weights for each in asked):
        raise UserError(
            "ask: weights of single modules go with one question; for several, write the sum first: qlora-lite mix"
        )
    found, _ = parts_of(asked)
    names = _short_names([each.path for each in asked])
    with show.phase("loading the base and the adapters"):
        blend = Blend(plan, {name: part.adapter for name, part in zip(names, found, strict=True)})
    weights = {name: each.weight for name, each in zip(names, asked, strict=True)}
    show.say(
        f"a line is a question; /use {' '.join(f'{name}:1' for name in names)} weighs the adapters (those not named count 0)"
    )
    answers: list[dict[str, Any]] = []
    for line in map(str.strip, lines):
        if line.startswith("/use"):
            try:
                weights = _weights_of(line, names)
            except UserError as error:
                show.say_warning(str(error))
        elif line:
            loaded = blend.use(weights)
            title = " ".join(f"{name}:{weight:g}" for name, weight in weights.items())
            answers.append({"question": line, "weights": weights, "answer": answer(plan, loaded, title, line, passage)})
    return {"answers": answers}


def _weights_of(line: str, names: Sequence[str]) -> dict[str, float]:
    given = [parse_part(word) for word in line.split()[1:]]
    unknown = [str(each.path) for each in given if str(each.path) not in names or each.weights]
    if unknown or not given:
        raise UserError(f"{line!r}: expected /use NAME:WEIGHT ..., with names of {', '.join(names)}")
    return {str(each.path): each.weight for each in given}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The folders' last names, or their whole paths where two are called the same."""
    last = [path.resolve().name for path in paths]
    return last if len(set(last)) == len(last) else [str(path) for path in paths]
