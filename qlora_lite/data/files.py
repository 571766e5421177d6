"""Data files as bytes: opened only when they are regular files of a sane size, and hashed.

In: a path. Out: an open file, or its SHA-256. What cannot be read is one clear DataError; nothing waits on a pipe.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from qlora_lite.errors import DataError
from qlora_lite.limits import DATA_FILE_BYTES
from qlora_lite.units import format_bytes

EXPECTED = "Expected SQuAD JSON, or rows as json, jsonl, csv, Parquet or a folder that `datasets` saved."


@contextmanager
def open_data_file(path: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes; raises DataError when it is missing, empty, too large or not a regular file."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            what = "a directory" if path.is_dir() else "not a regular file"
            raise DataError(f"{path}: {what}. {EXPECTED}")
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size)
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. {EXPECTED}") from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise DataError(f"{str(path)!r}: not a file name, it holds a NUL character.") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises DataError when it cannot be read."""
    digest = sha256()
    with open_data_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes == 0:
        raise DataError(f"{path}: the file is empty. {EXPECTED}")
    if num_bytes > DATA_FILE_BYTES:
        raise DataError(
            f"{path}: {format_bytes(num_bytes)}, allowed {format_bytes(DATA_FILE_BYTES)}. Split it into smaller files."
        )
