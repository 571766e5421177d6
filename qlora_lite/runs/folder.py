"""The folder of a run: its files and how they are written. Records are replaced atomically; the log is appended to.

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
from qlora_lite.files.library_names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from qlora_lite.files.manifest import MANIFEST_NAME, read_sealed
from qlora_lite.files.staging import locked_folder, make_folder
from qlora_lite.runs.records import LOG, refuse_changed, replace_record, seal_log

_BEFORE_BEGIN = (MANIFEST_NAME, "plan.json", "env.json")  # records written before recipe.yaml, with which a run begins


class RunDir:
    """Paths and records of one run. Every read of a record checks it against the run's manifest."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.steps = self.path / LOG
        self.checkpoints = self.path / "checkpoints"
        # A mix or a shortened adapter (adapters.py) is a run with its adapter beside its records.
        self.adapter = self.path if (self.path / ADAPTER_CONFIG_FILE).is_file() else self.path / "adapter"
        self.weights = self.path / "weights"
        self.merged = self.path / "merged"
        self.trackers = self.path / "trackers"
        self.profile = self.path / "profile"
        self._unlogged = ""  # lines of steps.jsonl that could not be written yet

    @classmethod
    def create(cls, path: Path | str) -> "RunDir":
        """Create an empty run folder. Raises RunError if it exists and is not empty, or cannot be created.

        Leftovers of a run that was killed before its first step do not count.
        """
        run = cls(path)
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise RunError(
                f"{str(path)!a}: is not UTF-8, and safetensors cannot write other names. Choose another --run-dir"
            ) from error
        try:
            if run.path.exists() and not run.path.is_dir():
                raise RunError(f"{run.path}: is a file, not a folder. Choose another --run-dir")
            if run.path.exists() and not run._is_as_good_as_empty():
                raise RunError(
                    f"{run.path}: already exists and is not empty. Choose another --run-dir, or continue the run with --resume"
                )
            make_folder(run.path)
            with run.locked():
                for name in _BEFORE_BEGIN:
                    (run.path / name).unlink(missing_ok=True)
                probe = run.path / ".writable.tmp"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise RunError(f"{run.path}: cannot be written ({error.strerror}). Choose another --run-dir") from error
        return run

    @classmethod
    @contextmanager
    def creating(cls, path: Path | str, *, made: Sequence[Path] = ()) -> Iterator["RunDir"]:
        """Create a run and lock it against other processes. If the block fails before the run has begun, remove its folders again,
        including `made`, folders created for it earlier.
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
                with suppress(OSError):  # rmdir refuses a folder that is not empty
                    for name in _BEFORE_BEGIN if is_ours else ():
                        (run.path / name).unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()
            raise

    @classmethod
    def open(cls, path: Path | str) -> "RunDir":
        """Open an existing run. Raises RunError if it does not exist, or if its recipe has changed since it was written."""
        run = cls(path)
        if not run.recipe.is_file():
            raise RunError(f"{run.path}: not a run: recipe.yaml is missing. Give a folder made by `qlora-lite train`")
        refuse_changed(run.path, run.recipe.name)
        return run

    @classmethod
    @contextmanager
    def writing(cls, path: Path | str) -> Iterator["RunDir"]:
        """Open a run and lock it against other processes."""
        run = cls.open(path)
        with run.locked():
            yield run

    @classmethod
    def claim_next(cls, parent: Path, name: str) -> tuple[Path, list[Path]]:
        """-> (`parent/name-N` with the first free number N, folders created). Two processes never claim the same one."""
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        for number in count(1):
            path = parent / f"{name}-{number}"
            try:
                make_folder(parent)
                path.mkdir()
                return path, [path, *missing]
            except FileExistsError:
                if not path.exists():  # a file is in the place of a parent folder
                    break
            except OSError:  # `create` reports the reason
                break
        return path, []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process, and remove incomplete files of killed ones. Raises RunError.

        The operating system holds the lock, on the folder itself, and releases it when the process ends.
        """
        with locked_folder(self.path) as is_ours:
            if not is_ours:
                raise RunError(
                    f"{self.path}: another process is writing to this run. Wait until it ends, or choose another --run-dir"
                )
            for folder in (self.path, self.checkpoints):
                _remove_half_written(folder)
            yield

    @property
    def has_begun(self) -> bool:
        """Whether training has written its first records; the recipe is the last one."""
        return self.recipe.is_file()

    @classmethod
    def is_unbegun(cls, path: Path | str) -> bool:
        """Whether a folder exists without any training: it is empty, or its run was killed before its first step."""
        return Path(path).is_dir() and cls(path)._is_as_good_as_empty()

    def _is_as_good_as_empty(self) -> bool:
        names = {path.name for path in self.path.iterdir() if not _is_half_written(path.name)}
        return not names or (names <= set(_BEFORE_BEGIN) and read_sealed(self.path / MANIFEST_NAME) is not None)

    @property
    def trained(self) -> Path | None:
        """adapter/ or weights/, published at the end of training; None before."""
        configs = {
            self.adapter: self.adapter / ADAPTER_CONFIG_FILE,
            self.weights: self.weights / CONFIG_FILE,
        }
        return next((folder for folder, config in configs.items() if config.is_file()), None)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace the JSON file `name` atomically. Raises RunError if it cannot be written."""
        self.write_text(name, json.dumps({"schema_version": 1, **value}, indent=2, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace `name` atomically. Raises RunError if it cannot be written."""
        with _names(self.path / name):
            replace_record(self.path, name, text)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in the file, {} if it does not exist. Raises RunError if it is damaged."""
        path = self.path / name
        if not path.is_file():
            return {}
        refuse_changed(self.path, name)
        try:
            value = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged ({error}). Remove it and rerun the command that writes it") from error
        if not isinstance(value, dict):
            raise RunError(f"{path}: damaged (not a JSON object). Remove it and rerun the command that writes it")
        return value

    @property
    def has_unlogged_steps(self) -> bool:
        """Whether lines of steps.jsonl wait for disk space."""
        return bool(self._unlogged)

    def append_step(self, stats: dict[str, Any]) -> str | None:
        """Append one line to steps.jsonl. Returns the reason if that fails; the line is then kept and written with the next one."""
        self._unlogged += json.dumps(stats) + "\n"
        try:
            self._write_log(sync=False)
        except OSError as error:
            return f"{self.steps}: cannot be written ({error.strerror})"
        return None

    def seal_steps(self) -> None:
        """Sync the lines so far, and record their hash. Raises RunError if they cannot be written."""
        with _names(self.steps):
            self._write_log(sync=True)
            seal_log(self.path)

    def _write_log(self, *, sync: bool) -> None:
        """Append the unlogged lines; cut off a partly written line."""
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
        """Return the complete lines of steps.jsonl, oldest first, without an incomplete last one. Raises RunError if it is damaged."""
        refuse_changed(self.path, LOG)
        return _whole_lines(self.steps, key="step", kind=int)

    def cut_steps(self, last: int) -> None:
        """Remove the lines after step `last`; a resumed run rewrites them."""
        kept = [json.dumps(step) + "\n" for step in self.read_steps() if step["step"] <= last]
        self._unlogged = ""
        self.write_text(LOG, "".join(kept))

    def write_predictions(self, predictions: Iterable[dict[str, Any]]) -> None:
        """Replace predictions.jsonl atomically."""
        lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        self.write_text("predictions.jsonl", lines)

    def read_predictions(self) -> list[dict[str, Any]]:
        """Return the lines of predictions.jsonl; [] if it does not exist yet. Raises RunError if it is damaged."""
        refuse_changed(self.path, "predictions.jsonl")
        return _whole_lines(self.path / "predictions.jsonl", key="id", kind=str)


def in_command(path: Path) -> str:
    """Return a path for a printed command: one that begins with a dash would be read as an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _is_half_written(name: str) -> bool:
    return name.startswith(".") and name.endswith((".tmp", ".staging"))


def _remove_half_written(folder: Path) -> None:
    """Remove incomplete files. The caller holds the lock, so no other process is writing them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _is_half_written(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif _is_half_written(path.name):
            path.unlink(missing_ok=True)


def _whole_lines(path: Path, *, key: str, kind: type) -> list[dict[str, Any]]:
    """Return the objects of a jsonl file that have `key`, in order, without incomplete lines."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            values.append(parse_json(line))
    return [value for value in values if isinstance(value, dict) and isinstance(value.get(key), kind)]


@contextmanager
def _names(path: Path) -> Iterator[None]:
    """Name the file in the error of a failed write: the system's error does not, once a file is open."""
    try:
        yield
    except OSError as error:
        advice = "Free some space; earlier files are complete, and --resume continues from the last checkpoint"
        raise RunError(f"{path}: cannot be written ({error.strerror})", advice=advice) from error
