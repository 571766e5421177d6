"""From what a recipe calls its base (a folder, a .gguf file, a shipped name, a hub name) to a folder of 16-bit safetensors.

The rest of the program knows only such folders. Nothing here opens a connection: a shipped or hub model that is not in the cache
is an error that names the command which brings it.
"""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_lite.errors import ModelError
from qlora_lite.model.bring import SHIPPED, shipped_path
from qlora_lite.model.gguf_folder import convert_gguf
from qlora_lite.recipe.hub_names import fetch_command, find_fetched, is_hub_name

SUPPORTED_TYPES = ("llama",)
_LARGEST_JSON_BYTES = 64 * 2**20


def find_base(base: str, *, cache: Path, revision: str | None = None) -> Path:
    """The folder with config.json and safetensors for `base`; a GGUF is converted into the cache first.

    A `revision` (branch, tag, commit) says that `base` is a hub name; without one, the hub's newest fetched is taken where
    there is no folder of that name.

    Raises ModelError when there is no such model, it is damaged, or of a kind that is not supported.
    """
    path = Path(base).expanduser()
    if base in SHIPPED and not path.exists():
        path = shipped_path(base, cache=cache)
        if not path.is_file():
            raise ModelError(
                f"model.base: {base} is not in the cache ({path.parent}). Bring it once: qlora-lite fetch {base}"
            )
    elif is_hub_name(base) and (revision is not None or not path.exists()):
        path = _fetched_folder(base, revision, cache=cache)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a base is a folder with config.json and safetensors, or a .gguf file")
        path = convert_gguf(path, cache=cache)
    if not path.is_dir():
        raise ModelError(f"{base}: no such folder, .gguf file or shipped name ({', '.join(SHIPPED)})")
    read_config(path)
    return path


def _fetched_folder(repo: str, revision: str | None, *, cache: Path) -> Path:
    folder = find_fetched(repo, revision, cache=cache)
    if folder is None:
        raise ModelError(
            f"model.base: {repo} is no folder here, and was not fetched into {cache}. Fetch it once with: "
            f"{fetch_command(repo, revision)}"
        )
    return folder


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises ModelError when it is missing, damaged or of a kind that is not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no config.json, so this is no model folder. Expected config.json and *.safetensors"
        )
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_TYPES:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported yet; supported: {', '.join(SUPPORTED_TYPES)}"
        )
    return config


def load_config(folder: Path) -> Any:
    """The folder's config as transformers' own type. Raises ModelError as `read_config` does, and for values of a wrong kind."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = read_config(folder)
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: describes no usable model ({type(error).__name__}: {error})"
        ) from error


def read_json(path: Path) -> dict:
    """One JSON object. Raises ModelError for anything else."""
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise ModelError(f"{path}: larger than {_LARGEST_JSON_BYTES:,} bytes, which no file of this kind is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def folder_fingerprint(folder: Path) -> str:
    """Short hash over names, sizes and modification times of a folder's files (contents are too large to read each start)."""
    stats = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    entries = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return sha256(json.dumps([os.fspath(folder.resolve()), entries]).encode()).hexdigest()[:16]
