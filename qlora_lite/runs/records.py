"""`RUN_DIR/manifest.json`: the hash of every record of a run, to detect a flipped bit in any of them.

In: the run's folder and a record's new text. Out: the replaced record, and its hash in the manifest.

    {"files": {"plan.json": {"bytes": 9, "sha256": "..."}, "steps.jsonl": {"bytes": 9, "sha256": "..."}}, ...}

Surprising: two files cannot be replaced atomically, so the new hash is written first, as `next`, and a record is valid with either hash.
A killed run leaves one of the two. For `steps.jsonl`, which grows by a line per step, each checkpoint seals the first `bytes`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.files.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Checked,
    is_entry,
    problem_of,
    read_sealed,
    seal,
    sha256_of_file,
)
from qlora_lite.files.staging import write_text_durably

LOG = "steps.jsonl"


def replace_record(folder: Path, name: str, text: str) -> None:
    """Replace the record `name` atomically. Raises OSError if it cannot be written, RunError for a damaged manifest."""
    now = _entry(text.encode())
    entries = _entries_or_begin(folder)
    _write(folder, entries | {name: entries.get(name, {}) | {"next": now}})
    write_text_durably(folder / name, text)
    _write(folder, entries | {name: now})


def seal_log(folder: Path) -> None:
    """Record the hash of the present content of steps.jsonl; the caller has synced the file."""
    data = (folder / LOG).read_bytes() if (folder / LOG).exists() else b""
    entries, now = _entries_or_begin(folder), _entry(data)
    if entries.get(LOG) != now or not (folder / MANIFEST_NAME).exists():
        _write(folder, entries | {LOG: now})


def refuse_changed(folder: Path, name: str) -> None:
    """Raise RunError if the record `name` has changed since it was written; a run without a manifest is accepted unchecked."""
    if not (folder / MANIFEST_NAME).exists():
        return
    entry = _entries_or_begin(folder).get(name)
    change = None if entry is None else _why_changed(folder, name, entry)
    if change is not None and change != "missing":
        raise RunError(
            f"{folder / name}: damaged ({change}). Remove it and rerun the command that writes it; `qlora-lite verify {folder}` "
            "lists all changes"
        )


def check_records(folder: Path) -> Iterator[Checked]:
    """Check the manifest, every record it lists, and every other file of the folder."""
    entries = _read(folder)
    if entries is None:
        exists = (folder / MANIFEST_NAME).exists()
        yield Checked(MANIFEST_NAME, "changed since it was written" if exists else "missing; no record can be checked")
        return
    yield Checked(MANIFEST_NAME, None)
    for name, entry in sorted(entries.items()):
        yield Checked(name, _why_changed(folder, name, entry))
    for path in sorted(folder.iterdir()):
        is_known = path.name in (*entries, MANIFEST_NAME) or (path.name.startswith(".") and path.name.endswith(".tmp"))
        if not is_known and (path.is_symlink() or not path.is_dir()):
            yield Checked(path.name, "not in the manifest: it was put here by something else", is_extra=True)


def _why_changed(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """Return the change of a file; None if it matches its entry or the entry's `next`."""
    allowed: list[Any] = [version for version in (entry, entry.get("next")) if is_entry(version)]
    problems = [_problem(folder / name, version) for version in allowed]
    # A run killed in the first write of a record leaves only `next`.
    was_never_written = "next" in entry and "bytes" not in entry and not (folder / name).exists()
    if None in problems or was_never_written:
        return None
    return problems[0] if problems else "the manifest has no hash for it"


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    if path.name != LOG or not path.is_file():
        return problem_of(path, expected)
    with path.open("rb") as file:
        sealed = file.read(expected["bytes"])
    if len(sealed) < expected["bytes"]:
        return f"{len(sealed)} bytes, but {expected['bytes']} at the last checkpoint"
    same = hashlib.sha256(sealed).hexdigest() == expected["sha256"]
    return None if same else "its lines up to the last checkpoint have changed"


def _entries_or_begin(folder: Path) -> dict[str, Any]:
    """Return the manifest's entries; without a manifest, entries of the present records. Raises RunError for a damaged manifest."""
    entries = _read(folder)
    if entries is not None:
        return entries
    if (folder / MANIFEST_NAME).exists():
        raise RunError(
            f"{folder / MANIFEST_NAME}: has changed since it was written, so the run's records cannot be checked against it. "
            "Remove it to accept them unchecked"
        )
    names = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in names}


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(folder: Path) -> dict[str, Any] | None:
    manifest = read_sealed(folder / MANIFEST_NAME)
    entries = None if manifest is None else manifest.get("files")
    if not isinstance(entries, dict):
        return None
    names_are_plain = all("/" not in name and "\\" not in name and name not in ("", ".", "..") for name in entries)
    return entries if names_are_plain and all(isinstance(entry, dict) for entry in entries.values()) else None


def _write(folder: Path, entries: dict[str, Any]) -> None:
    previous = read_sealed(folder / MANIFEST_NAME) or {"schema_version": SCHEMA_VERSION}
    manifest = previous | {"files": dict(sorted(entries.items()))}
    write_text_durably(folder / MANIFEST_NAME, seal(manifest))
