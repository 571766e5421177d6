"""The verb `report`: a run's tables, and its page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.records import check_records


@dataclass(frozen=True)
class Reported:
    """The page of a run."""

    path: Path

    def to_json_dict(self) -> dict[str, Any]:
        return {"path": str(self.path)}


def report(run_dir: Path) -> Reported:
    """Rewrite the run's HTML page from its files, and show its tables."""
    with RunDir.writing(run_dir) as run:
        for record in check_records(run.path):
            if record.why is not None:
                show.say_warning(f"{record.path}: {record.why}")
        show.show_run(run.path)
        path = write_report(run)
    show.say(f"page: {path}")
    return Reported(path)


def write_report(run: RunDir) -> Path:
    """Rewrite the run's page from its files."""
    path = run.path / "report.html"
    run.write_text(path.name, show.render_report(run.path))
    return path
