"""What `doctor --measure` kept: sizes of this machine that a plan's ledger cannot see, and its disk.

doctor writes and shows it, plan uses it.
"""

import json
from pathlib import Path
from typing import Any

KEPT = "doctor.json"  # in the cache


def kept_measurement(path: Path) -> dict[str, Any] | None:
    """What an earlier `--measure` kept; None where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("versions"), dict) else None


def disk_speed(cache: Path) -> dict[str, float | None]:
    """`disk_write_bytes_per_s` as a plan has it; None where it was not measured."""
    spread = (kept_measurement(cache / KEPT) or {}).get("disk_write_bytes_per_s")
    found = spread.get("median") if isinstance(spread, dict) else None
    return {"disk_write_bytes_per_s": found if isinstance(found, float) and found > 0 else None}
