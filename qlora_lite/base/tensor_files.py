"""The safetensors files of a folder, found and opened; the library checks each head against the file's size.

In: a folder or a file's path. Out: paths in the folder, open files. Raises ModelError for anything else.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from qlora_lite.base.source import read_json
from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.library_names import INDEX_FILE, PICKLES, WEIGHTS_FILE
from qlora_lite.files.names import inside
from qlora_lite.foreign import foreign
from qlora_lite.limits import SHARDS, TENSORS


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted by name; they need not exist. Raises ModelError for an unusable index."""
    index = folder / INDEX_FILE
    is_sharded = index.is_file()
    names = _files_in_index(index) if is_sharded else {WEIGHTS_FILE}
    try:
        return [inside(folder, name, named_by=str(folder)) for name in sorted(names)]
    except UserError as error:
        raise ModelError(f"{index}: no usable weight_map: {error}" if is_sharded else str(error)) from error


def open_safetensors(path: Path) -> Any:
    """Open a file of tensors; reads only its head. Raises ModelError for a missing, damaged or oversized file."""
    pickled = next((p for p in (path.with_suffix(end) for end in PICKLES) if p.is_file()), None)
    if not path.is_file():  # opening a pipe would block forever
        instead = f"; {pickled.name} is pickled, which is not supported" if pickled else ""
        raise ModelError(f"{path}: missing or damaged safetensors file (no such file{instead}). Fetch it again")
    with foreign(lambda reason: ModelError(f"{path}: missing or damaged safetensors file ({reason}). Fetch it again")):
        file = safe_open(str(path), framework="pt")
        num_tensors = len(file.keys())
    if num_tensors > TENSORS:
        raise ModelError(f"{path}: {num_tensors:,} tensors; allowed: {TENSORS:,}. Fetch it again")
    return file


def load_tensors(path: Path) -> dict[str, Any]:
    """Load every tensor of a file, memory-mapped. Raises ModelError as `open_safetensors` does."""
    file = open_safetensors(path)
    with foreign(lambda reason: ModelError(f"{path}: contains an unreadable tensor ({reason})")):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def _files_in_index(index: Path) -> set[str]:
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) and name.endswith(".safetensors") for name in files):
        raise ModelError(f"{index}: no usable weight_map; expected an object with a .safetensors file for each weight")
    if len(files) > TENSORS or len(set(files)) > SHARDS:
        raise ModelError(
            f"{index}: no usable weight_map: {len(files):,} weights in {len(set(files)):,} files; allowed {TENSORS:,} in {SHARDS:,}"
        )
    return set(files)
