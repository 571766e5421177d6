"""Read a model folder tensor by tensor: quantized or 16-bit safetensors in, fp32 row blocks out.

Files are memory-mapped, so reading costs page cache and no process memory; only one block of fp32 values (16 MiB) exists at a time. A
4-bit tensor gets the values that training computes with: bitsandbytes' own dequantization, rounded to the compute dtype (`gemm_4bit`
dequantizes to the dtype of its input, so a bf16 run never sees the unrounded values).

Surprising: bitsandbytes 0.50's AVX512 kernel reads the wrong `absmax` where the width is 32 more than a multiple of 64 (96, 160, ...).
Blocks of 64 run through the flattened tensor, so we dequantize it flat, as CUDA does. `kernel_misreads` identifies the tensors for which
this machine's own forward pass would differ.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.published import published_weights
from qlora_lite.base.quantization import SCALES, parts_of, read_quant_state, stored_quantization
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import load_config, read_config, read_json
from qlora_lite.base.tensor_files import open_safetensors, weight_files
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.files.safetensors_writer import DTYPE_NAMES

# Values of a row block: 16 MiB in fp32. Results do not depend on it.
ROW_BLOCK_ELEMENTS = 4 * 2**20
_LARGEST_QUANT_BLOCK = 4096

_DTYPES = {word: dtype for dtype, word in DTYPE_NAMES.items()}


class Checkpoint:
    """The tensors of a model folder, with their values in training with `compute_dtype`; None: the stored values.

    `names` are the tensors of the model: the parts of a quantized tensor count as one. `keys` maps them to the files' names where these
    differ; `files` replaces the files in a plan, which has none. Raises ModelError when files are missing, damaged, or quantized by
    another library than bitsandbytes.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        compute_dtype: torch.dtype | None = None,
        config: dict[str, Any] | None = None,
        keys: Mapping[str, str] | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._dequantized_dtype = compute_dtype or torch.bfloat16
        self._compute_dtype = compute_dtype
        self.config: dict[str, Any] = config or read_json(self.folder / CONFIG_FILE)
        self.quantization = stored_quantization(self.config, self.folder)
        self._files = _open_files(self.folder) if files is None else files
        self._keys = keys
        self._parts = parts_of(self._files)
        self.quantized = frozenset(self._parts)
        parts = {part for names in self._parts.values() for part in names}
        self.names = tuple(sorted(keys or (name for name in self._files if name not in parts)))

    def __contains__(self, name: str) -> bool:
        return name in (self._keys or self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.quantized and not self._is_int8:
            return tuple(self._quant_state(name).shape)
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type whose grid contains the values of `name`."""
        if name in self.quantized:
            return self._dequantized_dtype
        stored = self._stored_dtype(name)
        return stored if self.is_as_stored(name) or self._compute_dtype is None else self._compute_dtype

    def is_as_stored(self, name: str) -> bool:
        """Whether training uses the exact values of the file: not quantized, and not rounded to another type."""
        if name in self.quantized:
            return False
        stored = self._stored_dtype(name)
        return self._compute_dtype in (None, stored) or not stored.is_floating_point

    def stored(self, name: str) -> Tensor:
        """The stored tensor, memory-mapped (4-bit: the packed bytes)."""
        key = self._key(name)
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of an unquantized tensor in fp32: those of an embedding's tokens."""
        values = self.stored(name)[indices].float()
        return values if self.is_as_stored(name) else values.to(self.dtype(name)).float()

    def row_blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the values of `name` in fp32, as blocks of whole rows [rows, width] in new memory, which the caller may change.

        A one-dimensional tensor has one row per value; dimensions after the first are flattened.
        """
        num_rows, width = rows_and_width(self.shape(name))
        if name not in self.quantized or self._is_int8:
            stored = self.stored(name).reshape(num_rows, width)
            scales = self._row_scales(name) if name in self.quantized else None
            for start, stop in row_ranges(num_rows, width):
                values = stored[start:stop].to(torch.float32, copy=True)
                if scales is not None:
                    values *= scales[start:stop, None]
                yield values if self.is_as_stored(name) else values.to(self.dtype(name)).float()
            return
        state, packed = self._quant_state(name), self.stored(name).reshape(-1).view(torch.uint8)
        absmax = _absmax(state)
        for start, stop in row_ranges(num_rows, width):
            flat = _dequantize(packed, absmax, state, start * width, stop * width, self._dequantized_dtype)
            yield flat.view(stop - start, width).float()

    def kernel_misreads(self, name: str) -> bool:
        """Whether bitsandbytes' forward pass on this CPU dequantizes the 4-bit tensor `name` to wrong values."""
        if name not in self.quantized or self._is_int8:
            return False
        state = self._quant_state(name)
        width = state.shape[-1]
        if width % state.blocksize == 0:
            return False
        rows = min(state.shape[0], 2 * state.blocksize // math.gcd(width, state.blocksize))
        num, absmax = rows * width, _absmax(state)[: -(-rows * width // state.blocksize)]
        packed = self.stored(name).reshape(-1).view(torch.uint8)[: (num + 1) // 2]
        as_forward = torch.ops.bitsandbytes.dequantize_4bit(
            packed.view(-1, 1), absmax, state.blocksize, state.quant_type, (rows, width), self._dequantized_dtype
        )
        flat = _dequantize(packed, absmax, state, 0, num, self._dequantized_dtype)
        return not torch.equal(as_forward.reshape(-1), flat)

    @property
    def _is_int8(self) -> bool:
        return self.quantization is not None and self.quantization.kind == "int8"

    def _key(self, name: str) -> str:
        return self._keys[name] if self._keys is not None else name

    def _stored_dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        return _DTYPES[stored] if stored in _DTYPES else self.stored(name).dtype

    def _slice(self, name: str) -> Any:
        key = self._key(name)
        return self._files[key].get_slice(key)

    def _row_scales(self, name: str) -> Tensor:
        """[out] of an int8 tensor: value = stored * scale (LLM.int8, arXiv 2208.07339)."""
        return self.stored(f"{name.removesuffix('.weight')}.{SCALES}").float() / 127

    def _quant_state(self, name: str) -> Any:
        parts = {part: self.stored(part) for part in self._parts[name]}
        return read_quant_state(name, self.stored(name), parts)


def row_ranges(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of row blocks; each but the last consists of whole quantization blocks, of any size of bitsandbytes."""
    aligned = _LARGEST_QUANT_BLOCK // math.gcd(width, _LARGEST_QUANT_BLOCK)
    step = max(aligned, ROW_BLOCK_ELEMENTS // max(width, 1) // aligned * aligned)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _open_files(folder: Path) -> dict[str, Any]:
    """Tensor name -> open file; tensors are read on demand."""
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        file = open_safetensors(path)
        files.update(dict.fromkeys(file.keys(), file))
    return files


def open_checkpoint(folder: Path | str, *, compute_dtype: torch.dtype | None = None) -> Checkpoint:
    """Open a model folder under its model's own names: a quantized base directly, a 16-bit one through its published keys.

    Raises ModelError as `Checkpoint` and `published_weights` do.
    """
    folder = Path(folder)
    config = read_config(folder)
    if stored_quantization(config, folder) is not None:
        return Checkpoint(folder, compute_dtype=compute_dtype, config=config)
    weights = published_weights(folder, empty_model(load_config(folder)))
    config["tie_word_embeddings"] = weights.is_tied
    keys = {name: tensor.key for name, tensor in weights.tensors.items()}
    return Checkpoint(folder, compute_dtype=compute_dtype, config=config, keys=keys)


def rows_and_width(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a tensor as a matrix: one row per value for one dimension; dimensions after the first are flattened."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _absmax(state: Any) -> Tensor:
    """The fp32 scale of each block; double quantization stores it in 8 bits, in blocks of 256, around an offset (a mean)."""
    if not state.nested:
        return state.absmax.float()
    absmax: Tensor = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    return absmax.add_(state.offset).float()


def _dequantize(packed: Tensor, absmax: Tensor, state: Any, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Dequantize elements [first, last) of the flattened tensor; `first` is on a block boundary, so also on a byte boundary."""
    num, blocksize = last - first, state.blocksize
    shape = (num // blocksize, blocksize) if num % blocksize == 0 else (1, num)  # one row per block: flat on any kernel
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed[first // 2 : (last + 1) // 2].view(-1, 1),
        absmax[first // blocksize : -(-last // blocksize)],
        blocksize,
        state.quant_type,
        shape,
        dtype,
    )
    return values.reshape(-1)
