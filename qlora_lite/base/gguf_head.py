"""Checks on the head of a GGUF file before a library reads it (format: ggml-org/ggml, docs/gguf.md).

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    keys      name, type u32, value; a text is its length u64 and its bytes, a list is a type u32, a length u64 and its values
    tensors   name, number of dimensions u32, each u64, type u32, offset in the data u64

Why: the `gguf` package trusts the file. It would read a list of 2**60 numbers in a file of 100 bytes forever, and deeply nested lists
would overflow Python's stack. Here every count is compared with the rest of the file.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora_lite.limits import GGUF_DIMENSIONS, GGUF_KEYS, TENSORS

_VERSIONS = (2, 3)
_TEXT, _LIST = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
_NAME_BYTES = 2**16  # of a key or a tensor's name


def check_gguf_head(path: Path) -> None:
    """Raise ValueError for an invalid head, or one that announces more than the file contains."""
    with path.open("rb") as file:
        head = _Head(file)
        magic, version = head.unpack("<4sI")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"its first bytes are {magic!r} and version {version}; expected GGUF, version 2 or 3")
        num_tensors, num_keys = head.unpack("<QQ")
        if num_tensors > TENSORS or num_keys > GGUF_KEYS:
            raise ValueError(f"{num_tensors:,} tensors and {num_keys:,} keys; allowed: {TENSORS:,} and {GGUF_KEYS:,}")
        for _ in range(num_keys):
            head.skip_text(longest=_NAME_BYTES)
            head.skip_value()
        for _ in range(num_tensors):
            head.skip_tensor()
        head.check_data()


class _Head:
    """The unread rest of a file, read piece by piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size
        self._data_bytes, self._last = (
            0,
            "no tensor",
        )  # the end of the tensors after the head, and the tensor that ends last

    def unpack(self, format: str) -> tuple:
        size = struct.calcsize(format)
        self._take(size)
        return struct.unpack(format, self._file.read(size))

    def skip_text(self, *, longest: int) -> None:
        (length,) = self.unpack("<Q")
        if length > longest:
            raise ValueError(f"a text of {length:,} bytes; allowed: {longest:,}")
        self._skip(length)

    def skip_value(self) -> None:
        (kind,) = self.unpack("<I")
        if kind == _TEXT:
            self.skip_text(longest=self._left)
        elif kind == _LIST:
            self._skip_list()
        else:
            self._skip(_size_of(kind))

    def skip_tensor(self) -> None:
        self.skip_text(longest=_NAME_BYTES)
        (num_dimensions,) = self.unpack("<I")
        if num_dimensions > GGUF_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions:,} dimensions; allowed: {GGUF_DIMENSIONS}")
        shape = self.unpack(f"<{num_dimensions}Q")
        kind, offset = self.unpack("<IQ")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = offset + math.prod(shape) // block * block_bytes
        if end > self._data_bytes:
            self._data_bytes, self._last = end, f"a tensor of shape {list(shape)} at byte {offset:,}"

    def check_data(self) -> None:
        """After all tensors: raise ValueError if the file is too short for them. (Data begins at the next multiple of 32 or so.)"""
        if self._data_bytes > self._left:
            raise ValueError(f"{self._last} of the tensor data, but the file has only {self._left:,} bytes of it")

    def _skip_list(self) -> None:
        kind, length = self.unpack("<IQ")
        if kind == _LIST:
            raise ValueError("a list of lists, which no model key uses")
        if kind == _TEXT:
            for _ in range(length):  # ends with the file: each text takes at least 8 bytes
                self.skip_text(longest=self._left)
        else:
            self._skip(length * _size_of(kind))

    def _skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, os.SEEK_CUR)

    def _take(self, size: int) -> None:
        if size > self._left:
            raise ValueError(f"announces {size:,} more bytes, but only {self._left:,} are left in the file")
        self._left -= size


def _size_of(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of type {kind}, which GGUF does not define")
    return _SIZES[kind]
