"""The verb `report`: a run's tables, and its page."""

from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.records import check_records


def report(run_dir: Path) -> dict[str, Any]:
    """Write the run's one HTML page anew from its files, and show its tables."""
    with RunDir.writing(run_dir) as run:
        for found in check_records(run.path):
            if found.why is not None:
                show.say_warning(f"{found.path}: {found.why}")
        show.show_run(run.path)
        path = write_report(run)
    show.say(f"page: {path}")
    return {"path": str(path)}


def write_report(run: RunDir) -> Path:
    """The run's page anew from its files."""
    path = run.path / "report.html"
    run.write_text(path.name, show.render_report(run.path))
    return path
