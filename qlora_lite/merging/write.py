"""Write the merged checkpoint: base files + adapter files -> an ordinary 16-bit model folder, tensor by tensor.

    stored = round( dequantize(W) + scale * scaling * B @ A )      in fp32, rounded last; see rounding.py

Never from a live model: a merge needs one row block (16 MiB) in memory, whatever the size of the model, and an
evaluation that touched live weights cannot reach it. Tensors without an adapter are copied exactly.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.base.companions import copy_companions
from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.safetensors_writer import (
    MAX_SHARD_BYTES,
    ShardedWriter,
    TensorSpec,
)
from qlora_lite.files.staging import staged_folder, write_text_durably
from qlora_lite.memory.anonymous import HostMemoryMeter
from qlora_lite.merging.checkpoint import Checkpoint, open_checkpoint
from qlora_lite.merging.lora import Adapter, TokenRows, change_rows_, read_adapter
from qlora_lite.merging.rounding import DTYPES, ROUNDINGS, make_rounder
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class WriteResult:
    """What was written. `peak_host_bytes` is anonymous memory above the start, None outside Linux."""

    out: Path
    num_tensors: int
    num_merged: int
    total_bytes: int
    peak_host_bytes: int | None
    warnings: tuple[str, ...]


def merge_adapter(
    base_dir: Path | str,
    adapter_dir: Path | str,
    out_dir: Path | str,
    *,
    dtype: str = "bf16",
    rounding: str = "stochastic",
    scale: float = 1.0,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    compute_dtype: str | None = "bf16",
) -> WriteResult:
    """Merge without proof into `out_dir`, which must not exist or be empty; on an error nothing is left behind."""
    with staged_folder(out_dir) as folder:
        return write_merged(
            base_dir,
            adapter_dir,
            folder,
            dtype=dtype,
            rounding=rounding,
            scale=scale,
            seed=seed,
            max_shard_bytes=max_shard_bytes,
            compute_dtype=compute_dtype,
        )


def write_merged(
    base_dir: Path | str,
    adapter_dir: Path | str,
    folder: Path,
    *,
    dtype: str,
    rounding: str,
    scale: float,
    seed: int,
    max_shard_bytes: int,
    compute_dtype: str | None,
) -> WriteResult:
    """Write the merged model into the existing, empty `folder`.

    `compute_dtype` is the one of the training run ("bf16", or "fp16" on cards without bf16): 4-bit weights are
    dequantized to it, as training did. Raises ModelError where base and adapter do not belong together or values leave
    the range of `dtype`, UserError where the disk is too small.
    """
    check_options(dtype=dtype, rounding=rounding, scale=scale, compute_dtype=compute_dtype)
    with HostMemoryMeter() as meter:
        base, adapter = open_pair(base_dir, adapter_dir, compute_dtype=compute_dtype)
        specs = {
            name: TensorSpec(adapter.shape_of(name, base.shape(name)), _out_dtype(base, name, DTYPES[dtype]))
            for name in base.names
        }
        total_bytes = sum(spec.num_bytes for spec in specs.values())
        _check_disk(folder, total_bytes)
        with ShardedWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
            for name, spec in specs.items():
                blocks = merged_blocks(base, adapter, name, spec.dtype, rounding=rounding, scale=scale, seed=seed)
                writer.write(name, blocks)
        _write_config(base, adapter, folder, DTYPES[dtype])
        copy_companions(Path(adapter_dir), folder)  # a tokenizer with new tokens comes before the base's
        copy_companions(base.folder, folder)
    return WriteResult(folder, len(specs), len(adapter), total_bytes, meter.peak_bytes, tuple(_warnings(base, dtype)))


def merged_blocks(
    base: Checkpoint, adapter: Adapter, name: str, dtype: torch.dtype, *, rounding: str, scale: float, seed: int
) -> Iterator[Tensor]:
    """Blocks of one tensor as they are written. Raises ModelError for values that leave the range of `dtype`."""
    if not adapter.changes(name):
        return stored_blocks(base, name, dtype)
    rounder = make_rounder(name, dtype=dtype, rounding=rounding, seed=seed)
    return map(partial(_checked_rounded, rounder, name), tuned_row_blocks(base, adapter, name, scale))


def tuned_row_blocks(base: Checkpoint, adapter: Adapter, name: str, scale: float) -> Iterator[Tensor]:
    """Row blocks of a weight after training, fp32, not rounded. What is written and what is proved both come from here."""
    factors, whole = adapter.of_weight(name), adapter.whole.get(name)
    rows = adapter.rows.get(name)
    start = 0
    for block in base.row_blocks(name):
        if rows is not None:
            put_rows_(block, rows, start=start, scale=scale)
        elif factors is not None:
            change_rows_(block, factors, start=start, scale=scale)
        elif whole is not None:
            block.lerp_(whole[start : start + block.shape[0]].reshape(block.shape).float(), scale)
        yield block
        start += block.shape[0]
    if rows is not None and rows.num_rows > start:  # the base has nothing there that could be scaled
        yield rows.values_ND[rows.ids_N >= start].float()


def put_rows_(block: Tensor, rows: TokenRows, *, start: int, scale: float) -> None:
    """Move those rows of an fp32 block, which begins at row `start`, that were trained: all the way at scale 1."""
    is_here = (rows.ids_N >= start) & (rows.ids_N < start + block.shape[0])
    places = rows.ids_N[is_here] - start
    block[places] = block[places].lerp(rows.values_ND[is_here].float(), scale)


def stored_blocks(base: Checkpoint, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Blocks of a tensor without adapter in `dtype`: the file's own where training computed with these."""
    if base.is_as_stored(name) and base.dtype(name) == dtype:
        yield base.stored(name)
        return
    for block in base.row_blocks(name):
        yield _checked(block.to(dtype), name)


def open_pair(
    base_dir: Path | str, adapter_dir: Path | str, *, compute_dtype: str | None
) -> tuple[Checkpoint, Adapter]:
    """Base and adapter, after checking that every adapter module meets a base weight of its shape."""
    base = open_checkpoint(base_dir, compute_dtype=None if compute_dtype is None else DTYPES[compute_dtype])
    adapter = read_adapter(adapter_dir)
    problems = []
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{module}.weight": ("B @ A", factors.shape) for module, factors in adapter.factors.items()
    }
    shapes |= {name: ("its weight", tuple(tensor.shape)) for name, tensor in adapter.whole.items()}
    problems += [
        f"{name}: has new rows, and {base.folder} has no such weight" for name in adapter.rows if name not in base
    ]
    for name, (what, shape) in shapes.items():
        module = name.removesuffix(".weight")
        if name not in base.names:
            problems.append(f"{module}: {base.folder} has no {name}{_tied_hint(base, module)}")
        elif base.shape(name) != shape:
            problems.append(f"{module}: {what} is {list(shape)}, {name} is {list(base.shape(name))}")
        elif module == "lm_head" and base.config.get("tie_word_embeddings"):
            problems.append(f"{module}: the model ties it to its embedding, so a merged one would not be read back")
    if problems:
        head = f"{adapter_dir}: the adapter was not trained on this base ({len(problems)} of {len(adapter)} modules)"
        raise ModelError("\n".join([head, *(f"  {problem}" for problem in problems)]))
    return base, adapter


def check_options(*, dtype: str, rounding: str, scale: float, compute_dtype: str | None) -> None:
    """UserError that names the option, what it is and what it may be."""
    for option, value, allowed in (
        ("dtype", dtype, tuple(DTYPES)),
        ("rounding", rounding, ROUNDINGS),
        ("compute_dtype", compute_dtype, (*DTYPES, None)),
    ):
        if value not in allowed:
            raise UserError(f"merge.{option}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
    if not math.isfinite(scale):
        raise UserError(f"merge.scale: expected a finite number, got {scale}")


def _out_dtype(base: Checkpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    own = base.dtype(name)
    return dtype if own.is_floating_point else own


def _checked_rounded(rounder: Callable[[Tensor], Tensor], name: str, block: Tensor) -> Tensor:
    return _checked(rounder(block), name)


def _checked(block: Tensor, name: str) -> Tensor:
    finite = torch.isfinite(block)
    if not bool(finite.all()):  # counting makes 8 bytes of each boolean
        count = block.numel() - int(finite.sum())
        dtype = next(word for word, kind in DTYPES.items() if kind == block.dtype)
        raise ModelError(f"{name}: {count} values are not finite in {dtype}; try --set merge.dtype=bf16 or fp32")
    return block


def _check_disk(folder: Path, total_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < total_bytes:
        raise UserError(
            f"{folder.parent}: the merged model needs {format_bytes(total_bytes)}, {format_bytes(free)} free"
        )


def _write_config(base: Checkpoint, adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = {
        key: value for key, value in base.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    config["dtype"] = str(dtype).removeprefix("torch.")
    num_rows = max((adapter.shape_of(name, base.shape(name))[0] for name in adapter.rows), default=0)
    if num_rows:
        config["vocab_size"] = num_rows
    write_text_durably(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _warnings(base: Checkpoint, dtype: str) -> Iterator[str]:
    if dtype == "fp16":
        yield "fp16 holds values up to 65504 only: a model trained in bf16 may overflow when it runs in fp16"
    misread = [name for name in base.names if base.kernel_misreads(name)]
    if misread:
        width = base.shape(misread[0])[-1]
        yield (
            f"bitsandbytes misreads {len(misread)} 4-bit weights on this CPU, first {misread[0]} (width {width}, not a "
            "multiple of 64): the merge uses their true values, as a GPU does; an adapter trained on this CPU did not"
        )


def _tied_hint(base: Checkpoint, module: str) -> str:
    tied = module == "lm_head" and base.config.get("tie_word_embeddings")
    return " (the model ties its head to its embedding)" if tied else ""
