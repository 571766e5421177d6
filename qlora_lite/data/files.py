"""Data files: regular files of a plausible size, opened as bytes or (from any encoding) as UTF-8 text, and hashed.

In: a path. Out: an open file, or its SHA-256. Raises one clear DataError for an unreadable file; never blocks on a pipe.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qlora_lite.errors import DataError
from qlora_lite.files.manifest import hex_digest
from qlora_lite.files.text_file import NotText, OpenedText, decode_utf8, open_utf8
from qlora_lite.limits import DATA_FILE_BYTES
from qlora_lite.units import format_bytes

EXPECTED = "Expected SQuAD JSON, or rows as json, jsonl, csv, Parquet or a folder saved by `datasets`."


@contextmanager
def open_data_file(path: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes. Raises DataError when it is missing, empty, too large or not a regular file."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block forever
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise DataError(f"{path}: {kind}. {EXPECTED}")
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size)
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. {EXPECTED}") from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise DataError(f"{str(path)!r}: not a file name: contains a NUL character.") from error


@contextmanager
def open_text(path: Path) -> Iterator[OpenedText]:
    """Open a data file of any encoding as UTF-8 text; unpacks gzip. Raises DataError, also while it is read.

    Bytes that are not UTF-8 pass through; decode them with `decode_utf8`, whose NotText becomes a DataError here.
    """
    with open_data_file(path) as file:
        try:
            yield open_utf8(file, longest=DATA_FILE_BYTES)
        except NotText as error:
            raise DataError(f"{path}: line {error.line}: {error}") from error


def how_read(path: Path) -> str:
    """Return a note on how the text of a file is read; "" for plain UTF-8. Raises DataError."""
    with open_text(path) as text:
        return text.note


def refuse_other_encodings(path: Path) -> None:
    """Raise DataError, with the line, for a text file with bytes that are not UTF-8."""
    with open_text(path) as text:
        number = 1
        while block := text.stream.readline(2**20):
            is_whole = block.endswith(b"\n")
            decode_utf8(block if is_whole else _whole_characters(block), line=number)
            number += is_whole


def data_suffix(path: Path) -> str:
    """Return the suffix of the file's content: `.csv` for rows.CSV and for rows.csv.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Raises DataError when it is unreadable."""
    with open_data_file(path) as file:
        return hex_digest(file, hashlib.sha256())


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes == 0:
        raise DataError(f"{path}: the file is empty. {EXPECTED}")
    if num_bytes > DATA_FILE_BYTES:
        raise DataError(
            f"{path}: {format_bytes(num_bytes)}, allowed {format_bytes(DATA_FILE_BYTES)}. Split it into smaller files."
        )


def _whole_characters(block: bytes) -> bytes:
    """Remove an incomplete character at the end of a block of a very long line."""
    start = next((i for i in range(1, 4) if block[-i:][:1] >= b"\xc0"), 0)
    return block[:-start] if start else block
