"""The verb `verify`: every file of a run against its recorded hash."""

from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.runs.verify import verify_folder


def verify(run_dir: Path) -> dict[str, Any]:
    """Hold every file of a run, or of a folder with a manifest, against the hash that was noted when it was written."""
    with show.phase(f"reading every file of {run_dir}") as phase:
        found = list(verify_folder(run_dir))
        wrong = [file for file in found if not file.ok]
        phase.note(f"{len(found)} files, {len(wrong)} not as they were written")
    show.show_findings([(file.path, "problem", str(file.why), "") for file in wrong])
    show.say(f"{run_dir}: {'every file is as it was written' if not wrong else 'damaged, see above'}")
    return {
        "ok": not wrong,
        "num_files": len(found),
        "files": [{"path": file.path, "ok": file.ok, "why": file.why} for file in found],
    }
