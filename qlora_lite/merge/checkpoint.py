"""Read a model folder tensor by tensor: NF4 or 16-bit safetensors in, fp32 row blocks out.

Files are memory-mapped, so what is read costs page cache and no process memory; only one block of fp32 values (16 MiB)
exists at a time. A 4-bit tensor comes out as training computes with it: bitsandbytes' own dequantization, rounded to
the compute dtype (`gemm_4bit` dequantizes to the dtype of its input, so a bf16 run never sees the unrounded values).

Surprising: bitsandbytes 0.50's AVX512 kernel reads the wrong `absmax` where the width is 32 more than a multiple of 64
(96, 160, ...). Blocks of 64 are laid through the flattened tensor, so we dequantize it flat, as CUDA does, and
`kernel_misreads` names the tensors for which this machine's own forward would have computed something else.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_lite.errors import ModelError
from qlora_lite.model.bnb import bitsandbytes

# Rows of a block: as many as make 16 MiB in fp32. Results do not depend on it.
ROW_BLOCK_ELEMENTS = 4 * 2**20
_LARGEST_QUANT_BLOCK = 4096

_QUANT_STATE = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_QUANT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_QUANT_STATE)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The tensors of a model folder. `compute_dtype` is the one that training dequantizes 4-bit weights to.

    `names` holds the tensors as a model knows them: the parts of a 4-bit tensor count as one.
    Raises ModelError where files are missing or damaged, or quantized in another way than bitsandbytes 4-bit.
    """

    def __init__(self, folder: Path | str, *, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = Path(folder)
        self.compute_dtype = compute_dtype
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        _refuse_other_quantization(self.folder, self.config)
        self._files: dict[str, Any] = {}  # tensor name -> open file; tensors are read from it when asked for
        for path in _weight_files(self.folder):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        quantized = {name.removesuffix(end) for name in self._files for end in _QUANT_STATE if name.endswith(end)}
        parts = {name + part for name in quantized for part in _QUANT_PARTS}
        self.quantized = frozenset(quantized)
        self.names = tuple(sorted(name for name in self._files if name not in parts))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.quantized:
            return tuple(self._quant_state(name).shape)
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """What the values of `name` are on the grid of: the compute dtype for a 4-bit tensor, else the stored dtype."""
        if name in self.quantized:
            return self.compute_dtype
        stored = self._files[name].get_slice(name).get_dtype()
        return _DTYPES[stored] if stored in _DTYPES else self._files[name].get_tensor(name).dtype

    def stored(self, name: str) -> Tensor:
        """The tensor as it is in the file, memory-mapped (4-bit: the packed bytes)."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def row_blocks(self, name: str) -> Iterator[Tensor]:
        """The values of `name` in fp32, as blocks of whole rows [rows, width] (fresh memory, the caller's to change).

        A tensor with one dimension is one row for each value; one with more than two is flattened behind the first.
        """
        num_rows, width = _rows_and_width(self.shape(name))
        if name not in self.quantized:
            stored = self.stored(name).reshape(num_rows, width)
            for start, stop in row_ranges(num_rows, width):
                yield stored[start:stop].to(torch.float32, copy=True)
            return
        state, packed = self._quant_state(name), self.stored(name).reshape(-1)
        absmax = _absmax(state)
        for start, stop in row_ranges(num_rows, width):
            flat = _dequantize(packed, absmax, state, start * width, stop * width, self.compute_dtype)
            yield flat.view(stop - start, width).float()

    def kernel_misreads(self, name: str) -> bool:
        """Whether bitsandbytes' forward on this machine's CPU dequantizes 4-bit tensor `name` to other values."""
        if name not in self.quantized:
            return False
        state = self._quant_state(name)
        width = state.shape[-1]
        if width % state.blocksize == 0:
            return False
        rows = min(state.shape[0], 2 * state.blocksize // math.gcd(width, state.blocksize))
        num, absmax = rows * width, _absmax(state)[: -(-rows * width // state.blocksize)]
        packed = self.stored(name).reshape(-1)[: (num + 1) // 2]
        as_forward = torch.ops.bitsandbytes.dequantize_4bit(
            packed.view(-1, 1), absmax, state.blocksize, state.quant_type, (rows, width), self.compute_dtype
        )
        flat = _dequantize(packed, absmax, state, 0, num, self.compute_dtype)
        return not torch.equal(as_forward.reshape(-1), flat)

    def _quant_state(self, name: str) -> Any:
        parts = {name + part: self.stored(name + part) for part in _QUANT_PARTS if name + part in self._files}
        return bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu"))


def row_ranges(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks; each but the last is whole quantization blocks long, of any size bitsandbytes has."""
    aligned = _LARGEST_QUANT_BLOCK // math.gcd(width, _LARGEST_QUANT_BLOCK)
    step = max(aligned, ROW_BLOCK_ELEMENTS // max(width, 1) // aligned * aligned)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; ModelError where it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(f"{folder}: no model can be read from it, {', '.join(missing)} is missing")
    return paths


def _refuse_other_quantization(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization and not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit")):
        raise ModelError(
            f"{folder / 'config.json'}: quantized with {quantization.get('quant_method')}; "
            "a merge reads bitsandbytes 4-bit or plain 16-bit and 32-bit weights"
        )


def _rows_and_width(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _absmax(state: Any) -> Tensor:
    """fp32 scale of each block: with double quantization itself 8-bit in blocks of 256, around an offset (a mean)."""
    if not state.nested:
        return state.absmax.float()
    absmax: Tensor = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    return absmax.add_(state.offset).float()


def _dequantize(packed: Tensor, absmax: Tensor, state: Any, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Elements [first, last) of the flattened tensor, `first` on a block boundary (so also on a byte boundary)."""
    num, blocksize = last - first, state.blocksize
    shape = (num // blocksize, blocksize) if num % blocksize == 0 else (1, num)  # one row a block: flat on any kernel
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed[first // 2 : (last + 1) // 2].view(-1, 1),
        absmax[first // blocksize : -(-last // blocksize)],
        blocksize,
        state.quant_type,
        shape,
        dtype,
    )
    return values.reshape(-1)
