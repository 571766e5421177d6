"""`RUN_DIR/manifest.json`: the hash of every record of a run, so that a flipped bit in any of them is found.

In: the run's folder and a record's new text. Out: the record replaced, and its hash beside those of the others.

    {"files": {"plan.json": {"bytes": 9, "sha256": "..."}, "steps.jsonl": {"bytes": 9, "sha256": "..."}}, ...}

Surprising: two files cannot be replaced in one step, so the new hash is noted first, as `next`, and a record is whole when it is either.
A killed run leaves one of the two. Of `steps.jsonl`, which grows by a line each step, the first `bytes` are sealed, at every checkpoint.
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
    """Replace the record `name` in one step. Raises OSError when it cannot be written, RunError for a damaged manifest."""
    now = _entry(text.encode())
    entries = _entries_or_begin(folder)
    _write(folder, entries | {name: entries.get(name, {}) | {"next": now}})
    write_text_durably(folder / name, text)
    _write(folder, entries | {name: now})


def seal_log(folder: Path) -> None:
    """What steps.jsonl holds now must stay as it is; the file is synced by the caller."""
    data = (folder / LOG).read_bytes() if (folder / LOG).exists() else b""
    entries, now = _entries_or_begin(folder), _entry(data)
    if entries.get(LOG) != now or not (folder / MANIFEST_NAME).exists():
        _write(folder, entries | {LOG: now})


def refuse_changed(folder: Path, name: str) -> None:
    """Raise RunError when the record `name` is not as it was written; a run without a manifest is taken as it is."""
    if not (folder / MANIFEST_NAME).exists():
        return
    entry = _entries_or_begin(folder).get(name)
    why = None if entry is None else _why_changed(folder, name, entry)
    if why is not None and why != "missing":
        raise RunError(
            f"{folder / name}: damaged ({why}). Remove it and run the step that writes it again; `qlora-lite verify {folder}` "
            "says what else has changed"
        )


def check_records(folder: Path) -> Iterator[Checked]:
    """The manifest, every record it lists, and every other file beside them."""
    entries = _read(folder)
    if entries is None:
        there = (folder / MANIFEST_NAME).exists()
        yield Checked(
            MANIFEST_NAME, "changed since it was written" if there else "missing, so no record can be checked"
        )
        return
    yield Checked(MANIFEST_NAME, None)
    for name, entry in sorted(entries.items()):
        yield Checked(name, _why_changed(folder, name, entry))
    for path in sorted(folder.iterdir()):
        is_ours = path.name in (*entries, MANIFEST_NAME) or (path.name.startswith(".") and path.name.endswith(".tmp"))
        if not is_ours and (path.is_symlink() or not path.is_dir()):
            yield Checked(path.name, "not in the manifest: it was put here by something else", is_extra=True)


def _why_changed(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    """None where the file is what the entry says, or what was about to take its place."""
    allowed: list[Any] = [each for each in (entry, entry.get("next")) if is_entry(each)]
    found = [_problem(folder / name, each) for each in allowed]
    was_never_there = (
        "next" in entry and "bytes" not in entry and not (folder / name).exists()
    )  # its first writing was cut short
    if None in found or was_never_there:
        return None
    return found[0] if found else "the manifest says nothing about it"


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    if path.name != LOG or not path.is_file():
        return problem_of(path, expected)
    with path.open("rb") as file:
        sealed = file.read(expected["bytes"])
    if len(sealed) < expected["bytes"]:
        return f"{len(sealed)} bytes, and {expected['bytes']} were there at the last checkpoint"
    same = hashlib.sha256(sealed).hexdigest() == expected["sha256"]
    return None if same else "its lines up to the last checkpoint have changed"


def _entries_or_begin(folder: Path) -> dict[str, Any]:
    """The entries; without a manifest those of the records that are there."""
    entries = _read(folder)
    if entries is not None:
        return entries
    if (folder / MANIFEST_NAME).exists():
        raise RunError(
            f"{folder / MANIFEST_NAME}: has changed since it was written, so the run's records cannot be checked against it. "
            "Remove it to take them as they are"
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
    return entries if names_are_plain and all(isinstance(each, dict) for each in entries.values()) else None


def _write(folder: Path, entries: dict[str, Any]) -> None:
    kept = read_sealed(folder / MANIFEST_NAME) or {"schema_version": SCHEMA_VERSION}
    manifest = kept | {"files": dict(sorted(entries.items()))}
    write_text_durably(folder / MANIFEST_NAME, seal(manifest))
