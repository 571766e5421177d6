"""A small run that is killed and goes on, beside one that was never stopped: what must be equal in the end.

Equal are: the adapter, every checkpoint's tensors, steps.jsonl but for times and memory, the scores, the answers; nothing half-written
is left, and `verify` finds every file as it was written.
"""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lite.files.manifest import sha256_of_file
from tests.crash.server import Outcome, Server
from tests.tiny_model import save_tiny_llama
from tests.tiny_run import write_recipe

MEASURED = {"step_s", "rss_bytes", "peak_bytes", "phase_peaks", "answers_s", "other_cores"}  # differ from run to run


@dataclass
class Scenario:
    """A recipe, a server, and the outcome of a run that nothing disturbed."""

    folder: Path
    server: Server
    recipe: Path
    expected: dict[str, Any]
    points: list[str]  # the write points of the undisturbed run
    merge_points: list[str]

    def train(self, run: Path, *words: object, **options: Any) -> Outcome:
        return self.server.run("train", self.recipe, "--run-dir", run, *words, roots=[run], **options)

    def go_on(self, run: Path) -> Outcome:
        """What a user does after a crash: `--resume`, or the same command again where there was nothing to resume.

        A run that was killed at its very end is refused as finished, which is as it should be.
        """
        done = self.train(run, *(["--resume"] if run.exists() else []))
        is_refused = done.code == 2 and "is finished" in done.stderr
        return replace(done, code=0) if is_refused and self.finished(run) else done

    def finished(self, run: Path) -> bool:
        """Nothing is left to do: the last file was given its name before the kill."""
        return (run / "train.json").exists() and (run / "report.html").exists()

    def merge_again(self, run: Path) -> Outcome:
        """What a user does after a merge was killed; one that was killed at its very end is refused, because it is there."""
        done = self.server.run("merge", run, roots=[run])
        if done.code == 2 and "already exists" in done.stderr:
            assert (run / "merge.json").exists(), done.stderr
            return replace(done, code=0)
        return done

    def new_run(self) -> Path:
        """A folder's name that is free."""
        run = self.folder / "runs" / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(exist_ok=True)  # as the undisturbed one has it: else the numbers of write points move
        return run

    def copy_unmerged(self) -> Path:
        """The undisturbed run before it was merged."""
        run = self.new_run()
        shutil.copytree(self.folder / "unmerged", run)
        return run

    def point(self, what: str, *, nth: int = 1) -> int:
        """The number of the n-th write point of the undisturbed run that ends like `what`."""
        return [number for number, point in enumerate(self.points, 1) if point.endswith(what)][nth - 1]

    def difference(self, run: Path) -> list[str]:
        """What of a finished run is not as in the undisturbed one; [] when nothing is."""
        found = outcome_of(run)
        wrong = [key for key in self.expected.keys() | found.keys() if self.expected.get(key) != found.get(key)]
        checked = self.server.run("verify", run)
        return wrong + ([] if checked.code == 0 else [checked.stderr])


def prepare(folder: Path, server: Server, **train: Any) -> Scenario:
    """The recipe, and an undisturbed run of it with its merge."""
    base = save_tiny_llama(
        folder / "model", num_hidden_layers=1
    )  # hundreds of runs: no file is written for a second layer
    recipe = write_recipe(folder / "recipe", base=base, num_scored=2, **train)
    warm = folder / "warm"
    # Fills the cache: rows, quantized base; and the server's rehearsals.
    first = server.run("train", recipe, "--run-dir", warm, roots=[warm], leaves_rehearsals=True)
    assert first.code == 0, first.stderr
    calm = folder / "calm"
    done = server.run("train", recipe, "--run-dir", calm, roots=[calm])
    assert done.code == 0, done.stderr
    expected = outcome_of(calm)
    shutil.copytree(calm, folder / "unmerged")
    merged = server.run("merge", calm, roots=[calm])
    assert merged.code == 0, merged.stderr
    return Scenario(folder, server, recipe, expected, done.points, merged.points)


def outcome_of(run: Path) -> dict[str, Any]:
    """What a run has come to, without what was measured."""
    found: dict[str, Any] = {"files": sorted(_names(run))}
    for path in run.rglob("*.safetensors"):
        found[path.relative_to(run).as_posix()] = sha256_of_file(path)
    for name in ("steps.jsonl", "predictions.jsonl"):
        found[name] = [_lasting(json.loads(line)) for line in (run / name).read_text().splitlines()]
    found["eval.json"] = _lasting(json.loads((run / "eval.json").read_text()))
    return found


def _names(run: Path) -> list[str]:
    return [path.relative_to(run).as_posix() for path in run.rglob("*") if "report" not in path.name]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in MEASURED}
    return value


def phase_of(outcome: Outcome) -> str:
    """load, evaluation, checkpoint, step or publish: where a killed `train` was, by its screen and its last write point."""
    said = [line.strip() for line in outcome.stderr.splitlines()]

    def has_begun(what: str) -> bool:
        return any(line.startswith(what) for line in said)

    last = outcome.points[-1] if outcome.points else ""
    if has_begun("done:") or has_begun("scores"):
        return "publish"
    if has_begun("scoring the tuned model") or (
        has_begun("scoring the base model ...") and not has_begun("scoring the base model:")
    ):
        return "evaluation"
    if not has_begun("scoring the base model:"):
        return "load"
    if "checkpoints/." in last or last.endswith("checkpoints"):
        return "checkpoint"
    return "publish" if "adapter" in last or "memory.json" in last else "step"


def kinds_of_points(points: list[str]) -> dict[str, int]:
    """One write point of each kind, "what name" without numbers, with its place in `points`: of several the middle one."""
    found: dict[str, list[int]] = {}
    for number, point in enumerate(points, 1):
        _, what, path = point.split(" ", 2)
        found.setdefault(f"{what} {_plain(path)}", []).append(number)
    return {kind: numbers[len(numbers) // 2] for kind, numbers in found.items()}


def _plain(path: str) -> str:
    """`.step-000002.ab12cd34.staging/.manifest.json.77.tmp` -> `manifest.json`."""
    name = re.sub(r"\.[0-9a-f]{8}\.staging$|\.\d+\.tmp$", "", path.rsplit("/", 1)[-1]).lstrip(".")
    return re.sub(r"step-\d+", "step-N", name)
