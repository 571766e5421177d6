"""A writer of safetensors files, tensor by tensor and block by block: no checkpoint is complete in memory.

In:  the name, shape and dtype of every tensor, known up front; then the data of each tensor as blocks in row order.
Out: `model.safetensors`, or `model-00001-of-0000N.safetensors` ... and `model.safetensors.index.json` beside them.

Why not `safetensors.torch.save_file`: it needs every tensor of a file at once, leaves the file with mode 0600 and does
not fsync it. Here identical tensors give identical bytes in any write order: the header depends on the specs alone, and
each block goes to its own offset. The format: https://github.com/huggingface/safetensors (8 bytes little-endian header
length, JSON header padded to 8 bytes, data without gaps).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from qlora_lite.files.staging import write_text_durably

MAX_SHARD_BYTES = 5 * 2**30

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of a tensor whose data is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """Streams tensors into the safetensors files of `folder`; a context manager.

    `folder` must exist. Call `write(name, blocks)` once for each name of `tensors`, in any order. On a normal exit the
    writer checks that every tensor was written and fsyncs each file; on an error it removes the files.
    Shards are filled in the order of `tensors`, each up to `max_shard_bytes` (a larger tensor gets its own shard).
    Raises ValueError with the tensor's name on misuse.
    """

    def __init__(
        self,
        folder: Path | str,
        tensors: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
    ) -> None:
        self.folder = Path(folder)
        self.tensors = dict(tensors)
        self.metadata = {"format": "pt"} if metadata is None else dict(metadata)
        shards = _split_into_shards(self.tensors, max_shard_bytes)
        self.weight_map = {
            name: shard_file_name(stem, i, len(shards)) for i, names in enumerate(shards) for name in names
        }
        self._index_path = self.folder / f"{stem}.safetensors.index.json" if len(shards) > 1 else None
        self._shard_names = [shard_file_name(stem, i, len(shards)) for i in range(len(shards))]
        self._shards = dict(zip(self._shard_names, shards, strict=True))
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}  # tensor name -> first byte in its file
        self._written: set[str] = set()

    def __enter__(self) -> "ShardedWriter":
        try:
            for file_name, names in self._shards.items():
                self._files[file_name] = (self.folder / file_name).open("wb", buffering=0)
                self._start(file_name, names)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write tensor `name` from its `blocks`, which concatenate to its data in row-major order.

        Blocks are CPU tensors of the declared dtype (bf16 and memory-mapped ones are written without a copy).
        """
        if name not in self.tensors:
            raise ValueError(f"{name}: not declared to the writer")
        if name in self._written:
            raise ValueError(f"{name}: already written")
        spec = self.tensors[name]
        offset, num_bytes = self._offsets[name], 0
        file = self._files[self.weight_map[name]]
        file.seek(offset)
        for block in blocks:
            if block.dtype != spec.dtype:
                raise ValueError(f"{name}: declared as {spec.dtype}, got a block of {block.dtype}")
            num_bytes += block.numel() * block.element_size()
            if num_bytes > spec.num_bytes:
                break  # would overwrite the next tensor
            _write_all(file, _bytes_of(block))
        if num_bytes != spec.num_bytes:
            more = "more than " if num_bytes > spec.num_bytes else "only "
            raise ValueError(f"{name}: {list(spec.shape)} is {spec.num_bytes} bytes, got {more}{num_bytes}")
        self._written.add(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        missing = [name for name in self.tensors if name not in self._written]
        if missing:
            self._discard()
            raise ValueError(f"{len(missing)} declared tensors were never written, first {missing[0]}")
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
                file.close()
            if self._index_path is not None:
                total_size = sum(spec.num_bytes for spec in self.tensors.values())
                index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(self.weight_map.items()))}
                write_text_durably(self._index_path, json.dumps(index, indent=2) + "\n")
        except BaseException:
            self._discard()
            raise

    def _start(self, file_name: str, names: list[str]) -> None:
        """Write the header; the widest dtypes come first to align every tensor (readers view, not copy)."""
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        position = 0
        relative: dict[str, int] = {}
        for name in sorted(names, key=lambda name: (-self.tensors[name].dtype.itemsize, name)):
            spec = self.tensors[name]
            end = position + spec.num_bytes
            entry = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
            header[name] = entry
            relative[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._files[file_name]
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        start = 8 + len(text)
        self._offsets.update({name: start + offset for name, offset in relative.items()})
        file.truncate(start + position)

    def _discard(self) -> None:
        for file_name, file in self._files.items():
            file.close()
            (self.folder / file_name).unlink(missing_ok=True)


def shard_file_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _split_into_shards(tensors: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.num_bytes
    return shards


def _bytes_of(block: Tensor) -> memoryview:
    return block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:  # one write() takes at most 2 GiB
        data = data[file.write(data) :]
