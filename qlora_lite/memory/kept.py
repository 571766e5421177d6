"""Stored results of `doctor --measure`: sizes that a plan's ledger cannot see, and the speed of the disk.

doctor writes and shows them; plan uses them.
"""

import json
from pathlib import Path
from typing import Any

KEPT = "doctor.json"  # in the cache


def kept_measurement(path: Path) -> dict[str, Any] | None:
    """The document of an earlier `--measure`; None when it is missing or unreadable."""
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return measured if isinstance(measured, dict) and isinstance(measured.get("versions"), dict) else None


def disk_speed(cache: Path) -> dict[str, float | None]:
    """-> {"disk_write_bytes_per_s": bytes per second, or None when not measured}, as in a plan."""
    spread = (kept_measurement(cache / KEPT) or {}).get("disk_write_bytes_per_s")
    median = spread.get("median") if isinstance(spread, dict) else None
    return {"disk_write_bytes_per_s": median if isinstance(median, float) and median > 0 else None}
