"""A run's folder: which files it holds and how they are written. JSON files are replaced in one step, logs are appended.

recipe.yaml  plan.json  env.json  steps.jsonl  memory.json  eval.json  predictions.jsonl  merge.json  report.html
checkpoints/step-XXXXXX/   adapter/ (PEFT's format, and a manifest that names its step)   merged/   trackers/   profile/
weights/ (method: full; an ordinary model folder, with the same manifest)
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.model.safetensors_writer import write_text_durably


class RunDir:
    """Paths and JSON of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.steps = self.path / "steps.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.weights = self.path / "weights"
        self.merged = self.path / "merged"
        self.trackers = self.path / "trackers"
        self.profile = self.path / "profile"

    @classmethod
    def create(cls, path: Path | str) -> "RunDir":
        """A new, empty run folder. Raises RunError when it exists with something in it or cannot be made."""
        run = cls(path)
        try:
            if run.path.exists() and not run.path.is_dir():
                raise RunError(f"{run.path}: is a file, so it cannot hold a run. Name another --run-dir")
            if run.path.exists() and any(run.path.iterdir()):
                raise RunError(
                    f"{run.path}: already exists and is not empty. Name another --run-dir, or continue it with --resume"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            probe = run.path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RunError(f"{run.path}: cannot be written ({error.strerror}). Name another --run-dir") from error
        return run

    @classmethod
    @contextmanager
    def creating(cls, path: Path | str) -> Iterator["RunDir"]:
        """`create`; when the block fails before it has written something there, the empty folders go away again."""
        made = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
        run = cls.create(path)
        try:
            yield run
        except BaseException:
            with suppress(OSError):  # rmdir refuses a folder that holds something
                for folder in made:
                    folder.rmdir()
            raise

    @classmethod
    def open(cls, path: Path | str) -> "RunDir":
        """An existing run. Raises RunError when there is none."""
        run = cls(path)
        if not run.recipe.is_file():
            raise RunError(
                f"{run.path}: no recipe.yaml here, so this is no run. Give a folder that `qlora-lite train` made"
            )
        return run

    @classmethod
    def next_free(cls, parent: Path, name: str) -> Path:
        """`parent/name-1`, or the first number that is free."""
        number = 1
        while (parent / f"{name}-{number}").exists():
            number += 1
        return parent / f"{name}-{number}"

    @property
    def trained(self) -> Path | None:
        """adapter/ or weights/; None before training has come to its end, when it is published."""
        is_there = {
            self.adapter: self.adapter / "adapter_config.json",
            self.weights: self.weights / "config.json",
        }
        return next((folder for folder, file in is_there.items() if file.is_file()), None)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace `name` in one step."""
        text = json.dumps({"schema_version": 1, **value}, indent=2, default=str) + "\n"
        with _names(self.path / name):
            write_text_durably(self.path / name, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """The file's object, {} where there is none. Raises RunError for a damaged one."""
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: damaged ({error}). Remove it and run the step that writes it again") from error
        if not isinstance(value, dict):
            raise RunError(f"{path}: damaged (not a JSON object). Remove it and run the step that writes it again")
        return value

    def append_step(self, stats: dict[str, Any]) -> None:
        """One line of steps.jsonl."""
        with _names(self.steps), self.steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")

    def read_steps(self) -> list[dict[str, Any]]:
        """Whole lines of steps.jsonl, oldest first; a half-written last line is left out."""
        return _whole_lines(self.steps, key="step", kind=int)

    def cut_steps(self, last: int) -> None:
        """Forget lines after step `last`: a resumed run writes them anew."""
        kept = [json.dumps(step) + "\n" for step in self.read_steps() if step["step"] <= last]
        with _names(self.steps):
            write_text_durably(self.steps, "".join(kept))

    def write_predictions(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Replace predictions.jsonl."""
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        with _names(self.path / "predictions.jsonl"):
            write_text_durably(self.path / "predictions.jsonl", lines)

    def read_predictions(self) -> list[dict[str, Any]]:
        """The lines of predictions.jsonl; [] where there is none yet."""
        return _whole_lines(self.path / "predictions.jsonl", key="id", kind=str)


def _whole_lines(path: Path, *, key: str, kind: type) -> list[dict[str, Any]]:
    """The objects of a jsonl file that have `key`, in their order; half-written lines are left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict) and isinstance(value.get(key), kind)]


@contextmanager
def _names(path: Path) -> Iterator[None]:
    """A failed write says which file it was: the system's own error does not, once a file is open."""
    try:
        yield
    except OSError as error:
        advice = "Free some room; what was written before is whole, and --resume continues from the last checkpoint"
        raise RunError(f"{path}: cannot be written ({error.strerror}). {advice}") from error
