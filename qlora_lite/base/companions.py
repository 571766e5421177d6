"""The files of a model folder besides weights and config: tokenizer, templates, licence, generation settings."""

import shutil
from pathlib import Path

from qlora_lite.files.library_names import GENERATION_FILE
from qlora_lite.files.names import inside

_PATTERNS = (
    GENERATION_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
)


def copy_companions(source: Path, out: Path) -> None:
    """Copy them from one model folder to another; existing files stay.

    Raises UserError for a link out of `source`: its target (a private key, for example) would be published with the model.
    """
    for path in sorted({path for pattern in _PATTERNS for path in source.glob(pattern)}):
        if (out / path.name).exists() or ".safetensors" in path.name:
            continue
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            inside(source, file.relative_to(source).as_posix(), named_by=str(source))
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)
