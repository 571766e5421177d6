"""File names given by a file (a safetensors index, a manifest, a saved data set), confined to the folder of that file.

Surprising: the hub's own cache stores `models--ORG--NAME/snapshots/COMMIT/model.safetensors` as a link into the `blobs` folder beside
`snapshots`. Such links are followed; any other link out of the folder is refused.
"""

import os
import re
from pathlib import Path
from typing import Any

from qlora_lite.errors import UserError


def inside(folder: Path | str, name: Any, *, named_by: str) -> Path:
    """Return `folder / name` for a relative name with `/` that stays in `folder`, links included; the file need not exist.

    `named_by` is the file that gives the name. Raises UserError for any other name.
    """
    path = Path(folder, name) if isinstance(name, str) else Path(folder)
    reason = _why_not(name) or _leads_out(Path(folder), path)
    if reason:
        raise UserError(f"{named_by}: names the file {_shown(name)}, {reason}. File names must stay in {folder}")
    return path


def _why_not(name: Any) -> str:
    if not isinstance(name, str):
        return "which is not text"
    if not name or name != name.strip() or any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in name):
        return "which is empty, has spaces at its ends or contains control characters"
    if "\\" in name or re.match(r"[A-Za-z]:", name) or name.startswith(("/", "~")):
        return "which is an absolute path or contains a backslash"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return 'which leaves the folder ("..", "." or an empty part)'
    return ""


def _leads_out(folder: Path, path: Path) -> str:
    try:
        root, end = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        return f"which cannot be resolved ({error})"
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return "" if any(end.is_relative_to(parent) for parent in allowed) else "which is a link out of the folder"


def _shown(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else text[:119] + "…"
