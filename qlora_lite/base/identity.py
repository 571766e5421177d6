"""The identity of a base besides its weights: config values, tokenizer and chat template, each as one hash.

A run records them to recognize a base with the same weights but another tokenizer, template or config.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_lite.base.source import read_config, read_json
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.files.manifest import sha256_of_file

# Keys that may change when a folder is saved again (by another version, in another type) and do not affect the computation.
_OF_SAVING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"}
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def files_of_base(folder: Path) -> dict[str, str]:
    """Return the hex SHA-256 of `config.json` (its values) and, if present, `tokenizer` and `chat template`. Raises ModelError."""
    hashes = {CONFIG_FILE: _hash(_values(read_config(folder)))}
    tokenizer = {name: sha256_of_file(folder / name) for name in _TOKENIZER if (folder / name).is_file()}
    if tokenizer:
        hashes["tokenizer"] = _hash(tokenizer)
    template = _chat_template(folder)
    if template is not None:
        hashes["chat template"] = _hash(template)
    return hashes


def _values(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _values(value) for key, value in config.items() if key not in _OF_SAVING}


def _chat_template(folder: Path) -> Any:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") if settings.is_file() else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
