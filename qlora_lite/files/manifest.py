"""`manifest.json`: the size and SHA-256 of every file in a folder, because safetensors does not detect a flipped byte.

    {"schema_version": 2, "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}}, ...keys of the caller, "sha256": "..."}

Written last, so a folder without a manifest is unfinished. Names are relative to the folder, with `/`. The last key is the hash of
everything before it, and the text has one canonical form: a flipped bit in the manifest is detected, as in the files it lists.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lite.errors import UserError
from qlora_lite.files.json_text import parse_json
from qlora_lite.files.names import inside
from qlora_lite.files.staging import write_text_durably
from qlora_lite.limits import JSON_BYTES

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Checked:
    """A checked file; `why` is None if it is unchanged."""

    path: str  # relative to the folder, with `/`
    why: str | None
    is_extra: bool = False  # not in the manifest

    @property
    def ok(self) -> bool:
        return self.why is None


def sha256_of_file(path: Path | str) -> str:
    """Return the hex SHA-256 of a file's bytes, read in chunks."""
    with Path(path).open("rb") as file:
        return hex_digest(file, hashlib.sha256())


def hex_digest(file: BinaryIO, digest: "hashlib._Hash") -> str:
    """Feed the rest of an open file to `digest`, in chunks (Python 3.11 has it as hashlib.file_digest)."""
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_manifest(folder: Path | str) -> dict[str, dict[str, int | str]]:
    """Return `{name: {"bytes", "sha256"}}` of every file below `folder` except the manifest, sorted by name."""
    folder = Path(folder)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in sorted(_files_below(folder))
    }


def seal(document: Mapping[str, Any]) -> str:
    """Return JSON text of `document` with, as its last key, the SHA-256 of everything before it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return the document in a file written by `seal`, without the hash; None if the file is missing or changed."""
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
    """Hash every file of `folder`, write its manifest with the keys of `extra` added, and return it."""
    manifest = {"schema_version": SCHEMA_VERSION, "files": sha256_manifest(folder), **(extra or {})}
    write_text_durably(Path(folder) / MANIFEST_NAME, seal(manifest))
    return manifest


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """Return the manifest of `folder`; None if it is missing, changed, or names a file outside the folder."""
    manifest = read_sealed(Path(folder) / MANIFEST_NAME)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return None
    is_well_formed = all(map(is_entry, manifest["files"].values()))
    return manifest if is_well_formed and all(_is_below(Path(folder), name) for name in manifest["files"]) else None


def is_entry(value: Any) -> bool:
    """Whether a value has the form of a manifest's file entry."""
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def weights_sha256(manifest: Mapping[str, Any]) -> str:
    """Return one hash for a folder's weights: that of its safetensors file, or a hash over the hashes of several, in order."""
    hashes = [entry["sha256"] for name, entry in sorted(manifest["files"].items()) if name.endswith(".safetensors")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def folder_weights_sha256(folder: Path | str) -> str:
    """Return the same hash for a folder without a manifest, by hashing its safetensors files."""
    files = {path.name: {"sha256": sha256_of_file(path)} for path in Path(folder).glob("*.safetensors")}
    return weights_sha256({"files": files})


def verify_manifest(folder: Path | str) -> list[str]:
    """Check the files that the manifest lists -> one line per problem; [] if all are unchanged.

    Ignores unlisted files; `check_folder` reports them too.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME}: missing or damaged; no file in this folder can be checked"]
    problems = ((name, problem_of(folder / name, expected)) for name, expected in manifest["files"].items())
    return [f"{folder / name}: {why}" for name, why in problems if why is not None]


def check_folder(folder: Path) -> Iterator[Checked]:
    """Check every file of a folder: the manifest, the listed files, and the unlisted ones."""
    manifest = read_manifest(folder)
    if manifest is None:
        exists = (folder / MANIFEST_NAME).exists()
        yield Checked(MANIFEST_NAME, "changed since it was written" if exists else "missing; no file can be checked")
        return
    yield Checked(MANIFEST_NAME, None)
    for name, expected in manifest["files"].items():
        yield Checked(name, problem_of(folder / name, expected))
    for name in sorted(_files_below(folder) - manifest["files"].keys()):
        yield Checked(name, "not in the manifest: it was put here by something else", is_extra=True)


def problem_of(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Return how a file differs from the `expected` bytes and sha256; None if it does not."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size != expected["bytes"]:
            return f"{status.st_size} bytes, the manifest says {expected['bytes']}"
        if sha256_of_file(path) != expected["sha256"]:
            return "contents changed (its SHA-256 is not the manifest's)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _files_below(folder: Path) -> set[str]:
    """Return the names of all files except the manifest; links count as files and are not followed."""
    files = set[str]()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        files |= {(Path(parent) / name).relative_to(folder).as_posix() for name in [*names, *links]}
    return files - {MANIFEST_NAME}


def _is_below(folder: Path, name: str) -> bool:
    try:
        inside(folder, name, named_by=MANIFEST_NAME)
    except UserError:
        return False
    return True
