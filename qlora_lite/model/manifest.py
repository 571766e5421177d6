"""`manifest.json`: the size and SHA-256 of every file of a folder, because safetensors does not notice a flipped byte.

    {"schema_version": 1, "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}}, ...whatever the caller adds}

Written last, so a folder without a manifest is an unfinished one. Names are relative to the folder, with `/`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lite.model.safetensors_writer import write_text_durably

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1


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
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in paths
    }


def write_manifest(folder: Path | str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hash every file of `folder` and write its manifest, with the keys of `extra` added; returns what it wrote."""
    manifest = {"schema_version": SCHEMA_VERSION, "files": sha256_manifest(folder), **(extra or {})}
    write_text_durably(Path(folder) / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where there is none or it is not one."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


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

    Files that the manifest does not list are not looked at.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME}: missing or damaged, so nothing in this folder can be checked"]
    lines = (_problem(folder / name, expected) for name, expected in manifest["files"].items())
    return [line for line in lines if line is not None]


def _problem(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
    if sha256_of_file(path) != expected["sha256"]:
        return f"{path}: contents changed (its SHA-256 is not the manifest's)"
    return None
