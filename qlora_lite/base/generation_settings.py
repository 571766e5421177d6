"""generation_config.json of our adapters and merged models: plain `generate` must stop at the trained stop tokens.

Keeps the base's settings and stop tokens, and adds the trained ones to `eos_token_id`, which may be a list.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_lite.base.source import read_config, read_json
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import GENERATION_FILE

_FROM_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")  # transformers uses these if the file is missing


def add_stop_tokens(folder: Path, stop_tokens: Iterable[int], *, base: Path) -> None:
    """Add `stop_tokens` to the generation settings in `folder`; starts from the base's settings if the folder has none.

    Raises ModelError for unreadable settings.
    """
    source = next((path for path in (folder / GENERATION_FILE, base / GENERATION_FILE) if path.is_file()), None)
    settings = _of_config(base) if source is None else read_json(source)
    stops = stop_ids(settings.get("eos_token_id"), where=source or base)
    wanted = list(dict.fromkeys([*stops, *map(int, stop_tokens)]))
    if source == folder / GENERATION_FILE and wanted == stops:
        return
    eos = wanted if len(wanted) > 1 else wanted[0]
    text = json.dumps(settings | {"eos_token_id": eos}, indent=2, sort_keys=True) + "\n"
    (folder / GENERATION_FILE).write_text(text, encoding="utf-8")


def base_stops(base: Path) -> tuple[int, ...]:
    """Return the ids at which plain `generate` of the base stops. Raises ModelError for unreadable settings."""
    path = base / GENERATION_FILE
    settings = read_json(path) if path.is_file() else _of_config(base)
    return tuple(stop_ids(settings.get("eos_token_id"), where=path))


def stop_ids(given: Any, *, where: Path | str = "generation settings") -> list[int]:
    """Return `eos_token_id` (None, a number or a list, as transformers allows) as a list. Raises ModelError."""
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(type(token_id) is int for token_id in ids):
        raise ModelError(f"{where}: eos_token_id is {str(given)[:60]!r}; expected a token id or a list of token ids")
    return list(ids)


def _of_config(base: Path) -> dict[str, Any]:
    config = read_config(base)
    return {key: config[key] for key in _FROM_CONFIG if config.get(key) is not None}
