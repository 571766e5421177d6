"""`manifest.json`: the size and SHA-256 of every file of a folder, because safetensors does not notice a flipped byte.

    {"schema_version": 2, "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}}, ...what the caller adds, "sha256": "..."}

Written last, so a folder without a manifest is an unfinished one. Names are relative to the folder, with `/`. The last key is the hash
of all before it, and the file has exactly one spelling: a flipped bit anywhere in it is found, like one in the files it lists.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.errors import UserError
from qlora_lite.files.json_text import parse_json
from qlora_lite.files.names import inside
from qlora_lite.files.staging import write_text_durably
from qlora_lite.limits import JSON_BYTES

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Checked:
    """A file that was looked at; `why` is None where it is as it was written."""

    path: str  # relative to the folder, with `/`
    why: str | None
    is_extra: bool = False  # it was never listed

    @property
    def ok(self) -> bool:
        return self.why is None


def sha256_of_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_manifest(folder: Path | str) -> dict[str, dict[str, int | str]]:
    """`{name: {"bytes", "sha256"}}` of every file below `folder`, sorted by name, the manifest itself left out."""
    folder = Path(folder)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in sorted(_files_below(folder))
    }


def seal(document: Mapping[str, Any]) -> str:
    """The text of a JSON file that holds `document` and, as its last key, the SHA-256 of all before it."""
    own = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    return json.dumps({**own, "sha256": digest}, indent=2) + "\n"


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The document that `seal` made the text of, without its seal; None where there is none or a bit of it has changed."""
    try:
        if not path.is_file() or path.stat().st_size > JSON_BYTES:
            return None
        text = path.read_bytes().decode("utf-8")
        document = parse_json(text)
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or seal(document) != text:
        return None
    return {key: value for key, value in document.items() if key != "sha256"}


def write_manifest(folder: Path | str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hash every file of `folder` and write its manifest, with the keys of `extra` added; returns what it wrote."""
    manifest = {"schema_version": SCHEMA_VERSION, "files": sha256_manifest(folder), **(extra or {})}
    write_text_durably(Path(folder) / MANIFEST_NAME, seal(manifest))
    return manifest


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where there is none, or one that was changed or names a file outside the folder."""
    manifest = read_sealed(Path(folder) / MANIFEST_NAME)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return None
    is_well_formed = all(map(is_entry, manifest["files"].values()))
    return manifest if is_well_formed and all(_is_below(Path(folder), name) for name in manifest["files"]) else None


def is_entry(value: Any) -> bool:
    """Whether a value is what a manifest says of a file."""
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def weights_sha256(manifest: Mapping[str, Any]) -> str:
    """One hash that names a folder's weights: that of its safetensors file, or of the hashes of all of them in order."""
    hashes = [entry["sha256"] for name, entry in sorted(manifest["files"].items()) if name.endswith(".safetensors")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def folder_weights_sha256(folder: Path | str) -> str:
    """The same hash for a folder that may have no manifest: its safetensors are read and hashed now."""
    files = {path.name: {"sha256": sha256_of_file(path)} for path in Path(folder).glob("*.safetensors")}
    return weights_sha256({"files": files})


def verify_manifest(folder: Path | str) -> list[str]:
    """What is wrong with the files that the manifest lists, one line each; [] when all are as they were written.

    Files that the manifest does not list are not looked at; `check_folder` names them too.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME}: missing or damaged, so nothing in this folder can be checked"]
    problems = ((name, problem_of(folder / name, expected)) for name, expected in manifest["files"].items())
    return [f"{folder / name}: {why}" for name, why in problems if why is not None]


def check_folder(folder: Path) -> Iterator[Checked]:
    """Every file of a folder: its manifest, those that this lists, and those that it does not."""
    manifest = read_manifest(folder)
    if manifest is None:
        there = (folder / MANIFEST_NAME).exists()
        yield Checked(MANIFEST_NAME, "changed since it was written" if there else "missing, so nothing can be checked")
        return
    yield Checked(MANIFEST_NAME, None)
    for name, expected in manifest["files"].items():
        yield Checked(name, problem_of(folder / name, expected))
    for name in sorted(_files_below(folder) - manifest["files"].keys()):
        yield Checked(name, "not in the manifest: it was put here by something else", is_extra=True)


def problem_of(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Why a file is not the one that was written, with `expected` bytes and sha256; None where it is."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return "not an ordinary file"
        if found.st_size != expected["bytes"]:
            return f"{found.st_size} bytes, the manifest says {expected['bytes']}"
        if sha256_of_file(path) != expected["sha256"]:
            return "contents changed (its SHA-256 is not the manifest's)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _files_below(folder: Path) -> set[str]:
    """Names of everything but folders and the manifest; links count as files and are not followed."""
    found = set[str]()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found - {MANIFEST_NAME}


def _is_below(folder: Path, name: str) -> bool:
    try:
        inside(folder, name, named_by=MANIFEST_NAME)
    except UserError:
        return False
    return True
