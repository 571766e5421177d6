"""generation_config.json of what we write for others: plain `generate` has to stop where training taught the model to stop.

The base's own settings stay, its stop tokens first; the trained ones are added to `eos_token_id`, which may be a list.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_lite.base.source import read_config, read_json
from qlora_lite.errors import ModelError

FILE = "generation_config.json"
_FROM_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")  # what transformers takes where there is no such file


def add_stop_tokens(folder: Path, stop_tokens: Iterable[int], *, base: Path) -> None:
    """Make `folder` a place from which `generate` stops at `stop_tokens` too. Without a file of its own it gets the base's.

    Raises ModelError for settings that are not readable.
    """
    source = next((path for path in (folder / FILE, base / FILE) if path.is_file()), None)
    settings = _of_config(base) if source is None else read_json(source)
    own = settings.get("eos_token_id")
    stops = stop_ids(own, where=source or base)
    wanted = list(dict.fromkeys([*stops, *map(int, stop_tokens)]))
    if source == folder / FILE and wanted == stops:
        return
    eos = wanted if len(wanted) > 1 else wanted[0]
    text = json.dumps(settings | {"eos_token_id": eos}, indent=2, sort_keys=True) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def base_stops(base: Path) -> tuple[int, ...]:
    """The ids that plain `generate` of the base stops at. Raises ModelError for settings that are not readable."""
    path = base / FILE
    settings = read_json(path) if path.is_file() else _of_config(base)
    return tuple(stop_ids(settings.get("eos_token_id"), where=path))


def stop_ids(given: Any, *, where: Path | str = "generation settings") -> list[int]:
    """`eos_token_id` as transformers has it, nothing, a number or a list of numbers, as a list. Raises ModelError."""
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(type(one) is int for one in ids):
        raise ModelError(f"{where}: eos_token_id is {str(given)[:60]!r}, expected a token's id or a list of them")
    return list(ids)


def _of_config(base: Path) -> dict[str, Any]:
    config = read_config(base)
    return {key: config[key] for key in _FROM_CONFIG if config.get(key) is not None}
