"""Read the files of a run directory for the report: a missing file is empty; a damaged one is empty and named in `problems`."""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.show.lenient import mapping


@dataclass(frozen=True)
class Run:
    """The documents of a run, and the sizes in its folder: `disk` is (name, bytes), one per large part and one for all small files."""

    name: str
    plan: dict[str, Any]
    env: dict[str, Any]
    scores: dict[str, Any]
    memory: dict[str, Any]
    merge: dict[str, Any]
    rank: dict[str, Any]
    train: dict[str, Any]
    steps: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    recipe: str
    disk: list[tuple[str, int]]
    problems: list[str]


def read_run(folder: Path) -> Run:
    """Read what a stopped or damaged run has; never raises for a file."""
    files = _Files(folder)
    return Run(
        name=folder.resolve().name,
        plan=files.document("plan.json"),
        env=files.document("env.json"),
        scores=files.document("eval.json"),
        memory=files.document("memory.json"),
        merge=files.document("merge.json"),
        rank=files.document("rank.json"),
        train=files.document("train.json"),
        steps=files.lines("steps.jsonl"),
        predictions=files.lines("predictions.jsonl"),
        recipe=files.text("recipe.yaml"),
        disk=disk_sizes(folder),
        problems=files.problems,
    )


def disk_sizes(folder: Path) -> list[tuple[str, int]]:
    """Bytes of each folder that holds weights, of each checkpoint, and of all other files together."""
    large = [folder / "adapter", folder / "weights", *_sorted(folder / "checkpoints"), folder / "merged"]
    sizes = [(f"{path.relative_to(folder).as_posix()}/", _size(path)) for path in large if path.is_dir()]
    rest = _size(folder) - sum(size for _, size in sizes)
    return [*sizes, ("records and this page", rest)] if sizes or rest else []


class _Files:
    """Reads files of a folder, and collects their problems."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{name}: {error}")
            return ""

    def document(self, name: str) -> dict[str, Any]:
        text = self.text(name)
        return mapping(self._parse(name, text)) if text else {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        lines = self.text(name).splitlines()
        values = [self._parse(f"{name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        return [value for value in values if isinstance(value, dict)]

    def _parse(self, where: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{where}: {error}")
            return None


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(folder: Path) -> int:
    return sum(_file_sizes(folder))


def _file_sizes(folder: Path) -> Iterator[int]:
    """The bytes of each file below a folder; links are not followed, vanished files not counted."""
    for path in folder.rglob("*"):
        try:
            info = path.lstat()
        except OSError:
            continue
        if stat.S_ISREG(info.st_mode):
            yield info.st_size
