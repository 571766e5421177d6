"""File names that a file gives (a safetensors index, a manifest, a saved data set): only such as stay in its folder.

Surprising: the hub's own cache keeps `models--ORG--NAME/snapshots/COMMIT/model.safetensors` as a link into the `blobs` folder beside
`snapshots`. Such a link is followed, and no other that leads out.
"""

import os
import re
from pathlib import Path
from typing import Any

from qlora_lite.errors import UserError


def inside(folder: Path | str, name: Any, *, named_by: str) -> Path:
    """`folder / name` for a relative name with `/` that leads to no other place, not by a link either; it need not exist.

    `named_by` says which file gives the name. Raises UserError for any other name.
    """
    path = Path(folder, name) if isinstance(name, str) else Path(folder)
    reason = _why_not(name) or _leads_out(Path(folder), path)
    if reason:
        raise UserError(f"{named_by}: names the file {_shown(name)}, {reason}. A file's name must stay in {folder}")
    return path


def _why_not(name: Any) -> str:
    if not isinstance(name, str):
        return "which is no text"
    if not name or name != name.strip() or any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in name):
        return "which is empty or holds spaces at its ends or control characters"
    if "\\" in name or re.match(r"[A-Za-z]:", name) or name.startswith(("/", "~")):
        return "which is an absolute path or holds a backslash"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return 'which leads elsewhere ("..", "." or an empty part)'
    return ""


def _leads_out(folder: Path, path: Path) -> str:
    try:
        root, end = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        return f"which cannot be looked up ({error})"
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return "" if any(end.is_relative_to(one) for one in allowed) else "which is a link that leads out of the folder"


def _shown(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 120 else text[:119] + "…"
