"""The verb `verify`: every file of a run against its recorded hash."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.files.manifest import Checked
from qlora_lite.runs.verify import verify_folder


@dataclass(frozen=True)
class Verified:
    """Every file of a folder."""

    files: tuple[Checked, ...]

    @property
    def damaged(self) -> list[Checked]:
        return [file for file in self.files if not file.ok]

    @property
    def ok(self) -> bool:
        return not self.damaged

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "num_files": len(self.files),
            "files": [{"path": file.path, "ok": file.ok, "why": file.why} for file in self.files],
        }


def verify(run_dir: Path) -> Verified:
    """Compare every file of a run, or of a folder with a manifest, with the hash recorded when it was written."""
    with show.phase(f"reading every file of {run_dir}") as phase:
        verified = Verified(tuple(verify_folder(run_dir)))
        phase.note(f"{len(verified.files)} files, {len(verified.damaged)} with problems")
    show.show_findings([(file.path, "problem", str(file.why), "") for file in verified.damaged])
    show.say(f"{run_dir}: {'every file matches its hash' if verified.ok else 'damaged, see above'}")
    return verified
