"""The verb `verify`: every file of a run against its recorded hash."""

from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.runs.verify import verify_folder


def verify(run_dir: Path) -> dict[str, Any]:
    """Compare every file of a run, or of a folder with a manifest, with the hash recorded when it was written."""
    with show.phase(f"reading every file of {run_dir}") as phase:
        checked = list(verify_folder(run_dir))
        wrong = [file for file in checked if not file.ok]
        phase.note(f"{len(checked)} files, {len(wrong)} with problems")
    show.show_findings([(file.path, "problem", str(file.why), "") for file in wrong])
    show.say(f"{run_dir}: {'every file matches its hash' if not wrong else 'damaged, see above'}")
    return {
        "ok": not wrong,
        "num_files": len(checked),
        "files": [{"path": file.path, "ok": file.ok, "why": file.why} for file in checked],
    }
