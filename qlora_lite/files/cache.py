"""The cache: where it is, and what is in it. Everything there can be made or fetched again.

$QLORA_LITE_HOME, or ~/.cache/qlora_lite
    hub/         fetched models (recipe/hub_names.py)
    models/      the shipped model (base/shipped.py)
    converted/   GGUF files as model folders (base/gguf_folder.py)
    quantized/   quantized bases (base/artefact.py)
    data/        tokenized examples (data/examples.py)
    doctor.json  measurements of this machine (memory/kept.py)
"""

import os
from pathlib import Path

from qlora_lite.errors import UserError

TOKENIZED = "data"  # in the cache


def default_cache() -> Path:
    """Return `$QLORA_LITE_HOME`, or `~/.cache/qlora_lite`. Raises UserError when the user has no home folder."""
    setting = os.environ.get("QLORA_LITE_HOME")
    path = os.path.expanduser(setting or "~/.cache/qlora_lite")  # keeps ~ when the user has no home folder
    if path.startswith("~") and not os.path.exists(path):
        unknown = "HOME is not set, and the system has no home folder for this user"
        raise UserError(f"{setting or path}: {unknown}. Set QLORA_LITE_HOME to a folder for the cache")
    return Path(path)
