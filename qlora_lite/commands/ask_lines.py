"""`ask -`: one question per line from stdin, answered by one loaded base; `/use NAME:WEIGHT` sets the adapters' weights."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.ask import answer
from qlora_lite.errors import UserError
from qlora_lite.files.text_file import NotText, text_lines
from qlora_lite.runs.adapters import Asked, Blend, parse_part, parts_of


@dataclass(frozen=True)
class AnsweredLine:
    """One question, and the adapters' weights that answered it."""

    question: str
    weights: dict[str, float]
    answer: str


@dataclass(frozen=True)
class AnsweredLines:
    """All questions with their answers, in order."""

    answers: tuple[AnsweredLine, ...]

    def to_json_dict(self) -> dict[str, Any]:
        return {"answers": [asdict(line) for line in self.answers]}


def questions_of_stdin() -> Iterator[str]:
    """Yield each line of stdin as it arrives. Raises UserError for bytes that are not text, and when stdin is closed."""
    if sys.stdin is None:
        raise UserError("ask: - reads the questions from stdin, which is closed. Give the question as an argument")
    try:
        # A calling program may have replaced stdin by a text stream.
        yield from text_lines(sys.stdin.buffer) if hasattr(sys.stdin, "buffer") else sys.stdin
    except NotText as error:
        raise UserError(f"stdin: line {error.line}: {error}") from error


def ask_lines(
    run_dir: Path, lines: Iterable[str], parts: Sequence[str], *, passage: str | None, base: Path | None = None
) -> AnsweredLines:
    """Answer each line with one loaded base. A line `/use NAME:WEIGHT ...` sets the adapters' weights from then on, by folder name.

    `parts` are the adapters with their first weights; without any, the run's own adapter is the only one. An invalid `/use` prints a
    warning and changes nothing. Raises UserError, ModelError, RunError.
    """
    run, plan = api.open_run(run_dir, base=base)
    api.run_base(plan, run)
    asked = [parse_part(part) for part in parts] or [Asked(run_dir, 1.0, {})]
    if any(part.weights for part in asked):
        raise UserError(
            "ask: - takes one weight per adapter, not weights of single modules; write that sum first with qlora-lite mix"
        )
    loaded_parts, _ = parts_of(asked)
    names = _short_names([part.path for part in asked])
    with show.phase("loading the base and the adapters"):
        blend = Blend(plan, {name: part.adapter for name, part in zip(names, loaded_parts, strict=True)})
    weights = {name: part.weight for name, part in zip(names, asked, strict=True)}
    show.say(
        f"each line is a question; /use {' '.join(f'{name}:1' for name in names)} sets the adapters' weights (0 for adapters not named)"
    )
    answers: list[AnsweredLine] = []
    for line in map(str.strip, lines):
        if line.startswith("/use"):
            try:
                weights = _weights_of(line, names)
            except UserError as error:
                show.say_warning(str(error))
        elif line:
            loaded = blend.use(weights)
            title = " ".join(f"{name}:{weight:g}" for name, weight in weights.items())
            answers.append(AnsweredLine(line, weights, answer(plan, loaded, title, line, passage)))
    return AnsweredLines(tuple(answers))


def _weights_of(line: str, names: Sequence[str]) -> dict[str, float]:
    given = [parse_part(word) for word in line.split()[1:]]
    unknown = [str(part.path) for part in given if str(part.path) not in names or part.weights]
    if unknown or not given:
        raise UserError(f"{line!r}: expected /use NAME:WEIGHT ..., where NAME is one of {', '.join(names)}")
    return {str(part.path): part.weight for part in given}


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last name of each folder, or the whole paths when two names are equal."""
    last = [path.resolve().name for path in paths]
    return last if len(set(last)) == len(last) else [str(path) for path in paths]
