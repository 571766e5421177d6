"""What a test of the whole program needs: a recipe for the tiny model on a few short questions, and the command line in-process."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.tiny_model import tiny_source

NUM_STEPS = 4
SAVE_EVERY = 2


def write_recipe(folder: Path, *, base: Path | None = None, num_scored: int = 4, **train: Any) -> Path:
    """`folder/tiny.yaml` with its data beside it: 24 rows to train on, `num_scored` of 4 to score, NUM_STEPS steps of 4 examples.

    `base` is the model's folder; without it, `tiny_source`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_short_rows("train.json", 24, folder)
    _write_short_rows("test.json", 4, folder)
    sections = {
        "model": {"base": str(base or tiny_source())},
        "data": {"train": "train.json", "eval": "test.json"},
        "train": {"max_steps": NUM_STEPS, "examples_per_step": 4, "save_every_steps": SAVE_EVERY, **train},
        "eval": {"num_examples": num_scored, "max_new_tokens": 3},
    }
    path = folder / "tiny.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(keys)}" for name, keys in sections.items()), encoding="utf-8")
    return path


def _write_short_rows(name: str, num_rows: int, folder: Path) -> None:
    """The first questions of country_qa, each with only the sentence that answers it."""
    paragraphs: list[dict[str, Any]] = []
    source = json.loads((REPOSITORY / "recipes" / "country_qa" / name).read_text(encoding="utf-8"))
    for paragraph in (paragraph for article in source["data"] for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            text = question["answers"][0]["text"]
            sentence = next((part for part in paragraph["context"].split(". ") if text in part), None)
            if sentence is not None and len(paragraphs) < num_rows:
                answers = [{"text": text, "answer_start": sentence.index(text)}]
                paragraphs.append({"context": sentence, "qas": [{**question, "answers": answers}]})
    assert len(paragraphs) == num_rows
    document = {"version": "1.1", "data": [{"title": "short", "paragraphs": paragraphs}]}
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on stdout; fails when there is anything but exactly one line of JSON."""
        assert self.code in (0, 3), self.stderr
        assert self.stdout.count("\n") == 1 and self.stdout.endswith("\n"), self.stdout
        value = json.loads(self.stdout)
        assert value["schema_version"] == 1
        return value

    @property
    def last_line(self) -> str:
        return self.stderr.strip().splitlines()[-1]


def run_cli(*arguments: object) -> Done:
    """`qlora-lite ARGUMENTS` in this process. Not for signals: those end the process."""
    from qlora_lite.cli import main

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Done(code, out.getvalue(), err.getvalue())


def train_cli(recipe: Path, run_dir: Path, *arguments: object) -> Done:
    return run_cli("train", recipe, "--run-dir", run_dir, *arguments)
