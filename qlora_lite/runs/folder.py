"""A run's folder: which files it holds and how they are written. Records are replaced in one step, the log is appended to.

recipe.yaml  plan.json  env.json  steps.jsonl  memory.json  eval.json  predictions.jsonl  train.json  merge.json  report.html
manifest.json (their hashes: records.py)
checkpoints/step-XXXXXX/   adapter/ (PEFT's format, and a manifest that names its step)   merged/   trackers/   profile/
weights/ (method: full; an ordinary model folder, with the same manifest)
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.files.json_text import parse_json
from qlora_lite.files.manifest import MANIFEST_NAME, read_sealed
from qlora_lite.files.staging import locked_folder, make_folder
from qlora_lite.runs.records import LOG, refuse_changed, replace_record, seal_log

_BEFORE_BEGIN = (MANIFEST_NAME, "plan.json", "env.json")  # what is there before a run has begun: recipe.yaml comes last


class RunDir:
    """Paths and records of one run. Records are checked against the run's manifest before they are read."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.steps = self.path / LOG
        self.checkpoints = self.path / "checkpoints"
        # A mix or a truncated adapter (adapters.py) is a run whose adapter lies beside its records.
        self.adapter = self.path if (self.path / "adapter_config.json").is_file() else self.path / "adapter"
        self.weights = self.path / "weights"
        self.merged = self.path / "merged"
        self.trackers = self.path / "trackers"
        self.profile = self.path / "profile"
        self._unlogged = ""  # lines of steps.jsonl that could not be written yet

    @classmethod
    def create(cls, path: Path | str) -> "RunDir":
        """A new, empty run folder. Raises RunError when it exists with something in it or cannot be made.

        What a run left that was killed before its first step does not count.
        """
        run = cls(path)
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise RunError(
                f"{str(path)!a}: is no UTF-8, and safetensors writes no other names. Name another --run-dir"
            ) from error
        try:
            if run.path.exists() and not run.path.is_dir():
                raise RunError(f"{run.path}: is a file, so it cannot hold a run. Name another --run-dir")
            if run.path.exists() and not run._is_as_good_as_empty():
                raise RunError(
                    f"{run.path}: already exists and is not empty. Name another --run-dir, or continue it with --resume"
                )
            make_folder(run.path)
            with run.locked():
                for name in _BEFORE_BEGIN:
                    (run.path / name).unlink(missing_ok=True)
                probe = run.path / ".writable.tmp"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise RunError(f"{run.path}: cannot be written ({error.strerror}). Name another --run-dir") from error
        return run

    @classmethod
    @contextmanager
    def creating(cls, path: Path | str, *, made: Sequence[Path] = ()) -> Iterator["RunDir"]:
        """`create`, and the run held against other processes; when the block fails before the run has begun, its folders go again,
        those too that `made` names, which were made for it before.
        """
        made = [*(folder for folder in (Path(path), *Path(path).parents) if not folder.exists()), *made]
        run, is_ours = cls(path), False
        try:
            cls.create(path)
            is_ours = True
            with run.locked():
                yield run
        except BaseException:
            if not run.has_begun:
                with suppress(OSError):  # rmdir refuses a folder that holds something
                    for name in _BEFORE_BEGIN if is_ours else ():
                        (run.path / name).unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()
            raise

    @classmethod
    def open(cls, path: Path | str) -> "RunDir":
        """An existing run. Raises RunError when there is none, or when its recipe has changed since it was written."""
        run = cls(path)
        if not run.recipe.is_file():
            raise RunError(
                f"{run.path}: no recipe.yaml here, so this is no run. Give a folder that `qlora-lite train` made"
            )
        refuse_changed(run.path, run.recipe.name)
        return run

    @classmethod
    @contextmanager
    def writing(cls, path: Path | str) -> Iterator["RunDir"]:
        """`open`, and the run held against other processes."""
        run = cls.open(path)
        with run.locked():
            yield run

    @classmethod
    def claim_next(cls, parent: Path, name: str) -> tuple[Path, list[Path]]:
        """-> (`parent/name-1`, or the first number that is free; the folders that were made). Two processes never claim the same one."""
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        for number in count(1):
            path = parent / f"{name}-{number}"
            try:
                make_folder(parent)
                path.mkdir()
                return path, [path, *missing]
            except FileExistsError:
                if not path.exists():  # a file stands where a folder above it should be
                    break
            except OSError:  # `create` says why it cannot be made
                break
        return path, []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only this process writes inside the block; what a killed one left half-written is removed. Raises RunError.

        The lock is the system's, on the folder itself, and dies with the process that holds it.
        """
        with locked_folder(self.path) as is_ours:
            if not is_ours:
                raise RunError(
                    f"{self.path}: another process is writing to this run. Wait until it has ended, or name another --run-dir"
                )
            for folder in (self.path, self.checkpoints):
                _remove_half_written(folder)
            yield

    @property
    def has_begun(self) -> bool:
        """Training has written its first records, the recipe last."""
        return self.recipe.is_file()

    @classmethod
    def is_unbegun(cls, path: Path | str) -> bool:
        """A folder that is there and in which nothing was trained yet: it is empty, or its run was killed before its first step."""
        return Path(path).is_dir() and cls(path)._is_as_good_as_empty()

    def _is_as_good_as_empty(self) -> bool:
        names = {path.name for path in self.path.iterdir() if not _is_half_written(path.name)}
        return not names or (names <= set(_BEFORE_BEGIN) and read_sealed(self.path / MANIFEST_NAME) is not None)

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
        self.write_text(name, json.dumps({"schema_version": 1, **value}, indent=2, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace `name` in one step. Raises RunError when it cannot be written."""
        with _names(self.path / name):
            replace_record(self.path, name, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """The file's object, {} where there is none. Raises RunError for a damaged one."""
        path = self.path / name
        if not path.is_file():
            return {}
        refuse_changed(self.path, name)
        try:
            value = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged ({error}). Remove it and run the step that writes it again") from error
        if not isinstance(value, dict):
            raise RunError(f"{path}: damaged (not a JSON object). Remove it and run the step that writes it again")
        return value

    @property
    def has_unlogged_steps(self) -> bool:
        """Lines of steps.jsonl wait for room."""
        return bool(self._unlogged)

    def append_step(self, stats: dict[str, Any]) -> str | None:
        """One line of steps.jsonl; -> why it could not be written: then it is kept, and written with the next one."""
        self._unlogged += json.dumps(stats) + "\n"
        try:
            self._write_log(sync=False)
        except OSError as error:
            return f"{self.steps}: cannot be written ({error.strerror})"
        return None

    def seal_steps(self) -> None:
        """Make the lines so far durable, and hold them against changes. Raises RunError when they cannot be written."""
        with _names(self.steps):
            self._write_log(sync=True)
            seal_log(self.path)

    def _write_log(self, *, sync: bool) -> None:
        """Append what is not logged yet; a line that was written in part is cut off again."""
        with self.steps.open("ab", buffering=0) as file:
            end, left = file.tell(), memoryview(self._unlogged.encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
            self._unlogged = ""
            if sync:
                os.fsync(file.fileno())

    def read_steps(self) -> list[dict[str, Any]]:
        """Whole lines of steps.jsonl, oldest first; a half-written last line is left out. Raises RunError for a damaged one."""
        refuse_changed(self.path, LOG)
        return _whole_lines(self.steps, key="step", kind=int)

    def cut_steps(self, last: int) -> None:
        """Forget lines after step `last`: a resumed run writes them anew."""
        kept = [json.dumps(step) + "\n" for step in self.read_steps() if step["step"] <= last]
        self._unlogged = ""
        self.write_text(LOG, "".join(kept))

    def write_predictions(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Replace predictions.jsonl."""
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        self.write_text("predictions.jsonl", lines)

    def read_predictions(self) -> list[dict[str, Any]]:
        """The lines of predictions.jsonl; [] where there is none yet. Raises RunError for a damaged one."""
        refuse_changed(self.path, "predictions.jsonl")
        return _whole_lines(self.path / "predictions.jsonl", key="id", kind=str)


def in_command(path: Path) -> str:
    """A path as a printed command has it: one that begins with a dash would be read as options."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _is_half_written(name: str) -> bool:
    return name.startswith(".") and name.endswith((".tmp", ".staging"))


def _remove_half_written(folder: Path) -> None:
    """For whoever holds the run: no other process can be writing these."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _is_half_written(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif _is_half_written(path.name):
            path.unlink(missing_ok=True)


def _whole_lines(path: Path, *, key: str, kind: type) -> list[dict[str, Any]]:
    """The objects of a jsonl file that have `key`, in their order; half-written lines are left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            found.append(parse_json(line))
    return [value for value in found if isinstance(value, dict) and isinstance(value.get(key), kind)]


@contextmanager
def _names(path: Path) -> Iterator[None]:
    """A failed write says which file it was: the system's own error does not, once a file is open."""
    try:
        yield
    except OSError as error:
        advice = "Free some room; what was written before is whole, and --resume continues from the last checkpoint"
        raise RunError(f"{path}: cannot be written ({error.strerror})", advice=advice) from error
