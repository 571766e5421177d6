"""Write the merged checkpoint: base files + adapter files -> an ordinary 16-bit model folder, tensor by tensor.

    stored = round( dequantize(W) + scale * scaling * B @ A )      in fp32, rounded last; see rounding.py

A merge reads files, never a live model: it needs one row block (16 MiB) in memory for any model size, and changes to live weights cannot
affect it. Tensors without an adapter are copied exactly.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.base.companions import copy_companions
from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.files.safetensors_writer import (
    MAX_SHARD_BYTES,
    ShardedWriter,
    TensorSpec,
)
from qlora_lite.files.staging import free_bytes, write_text_durably
from qlora_lite.memory.anonymous import HostMemoryMeter
from qlora_lite.merging.checkpoint import Checkpoint, open_checkpoint
from qlora_lite.merging.lora import Adapter, TokenRows, change_rows_, read_adapter
from qlora_lite.merging.rounding import ROUNDINGS, make_rounder
from qlora_lite.model.dtypes import DTYPES, word_of
from qlora_lite.units import format_bytes


@dataclass(frozen=True)
class WriteResult:
    """The written model. `peak_host_bytes` is anonymous memory above the start, None outside Linux."""

    out: Path
    num_tensors: int
    num_merged: int
    total_bytes: int
    peak_host_bytes: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class MergeOptions:
    """How the merged weights are computed and stored. Raises UserError with the option, its value and the allowed values."""

    dtype: str = "bf16"
    rounding: str = "stochastic"
    scale: float = 1.0  # factor on the adapter's change
    seed: int = 0  # of stochastic rounding
    compute_dtype: str | None = "bf16"  # of the training run: 4-bit weights are dequantized to it, as in training
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("rounding", self.rounding, ROUNDINGS),
            ("compute_dtype", self.compute_dtype, (*DTYPES, None)),
        ):
            if value not in allowed:
                raise UserError(f"merge.{option}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
        if not math.isfinite(self.scale):
            raise UserError(f"merge.scale: expected a finite number, got {self.scale}")


def write_merged(base_dir: Path | str, adapter_dir: Path | str, folder: Path, options: MergeOptions) -> WriteResult:
    """Write the merged model into the existing, empty `folder`.

    Raises ModelError when base and adapter do not belong together or values exceed the range of `dtype`, UserError when the
    disk is too small.
    """
    dtype = DTYPES[options.dtype]
    with HostMemoryMeter() as meter:
        base, adapter = open_pair(base_dir, adapter_dir, compute_dtype=options.compute_dtype)
        specs = {
            name: TensorSpec(adapter.shape_of(name, base.shape(name)), _out_dtype(base, name, dtype))
            for name in base.names
        }
        total_bytes = sum(spec.num_bytes for spec in specs.values())
        _check_disk(folder, total_bytes)
        with ShardedWriter(folder, specs, max_shard_bytes=options.max_shard_bytes) as writer:
            for name, spec in specs.items():
                blocks = merged_blocks(
                    base, adapter, name, spec.dtype, rounding=options.rounding, scale=options.scale, seed=options.seed
                )
                writer.write(name, blocks)
        _write_config(base, adapter, folder, dtype)
        copy_companions(
            Path(adapter_dir), folder
        )  # an adapter's tokenizer (with new tokens) takes precedence over the base's
        copy_companions(base.folder, folder)
    return WriteResult(
        folder, len(specs), len(adapter), total_bytes, meter.peak_bytes, tuple(_warnings(base, options.dtype))
    )


def merged_blocks(
    base: Checkpoint, adapter: Adapter, name: str, dtype: torch.dtype, *, rounding: str, scale: float, seed: int
) -> Iterator[Tensor]:
    """The blocks of one tensor as written. Raises ModelError for values outside the range of `dtype`."""
    if not adapter.changes(name):
        return stored_blocks(base, name, dtype)
    rounder = make_rounder(name, dtype=dtype, rounding=rounding, seed=seed)
    return (_checked(rounder(block), name) for block in tuned_row_blocks(base, adapter, name, scale))


def tuned_row_blocks(base: Checkpoint, adapter: Adapter, name: str, scale: float) -> Iterator[Tensor]:
    """Yield row blocks of a weight after training, in fp32, not rounded. Both the merge and its proof use this function."""
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
    if rows is not None and rows.num_rows > start:  # the base has no values there to scale from
        yield rows.values_ND[rows.ids_N >= start].float()


def put_rows_(block: Tensor, rows: TokenRows, *, start: int, scale: float) -> None:
    """Move the trained rows of an fp32 block, which begins at row `start`, towards their trained values: completely at scale 1."""
    is_here = (rows.ids_N >= start) & (rows.ids_N < start + block.shape[0])
    places = rows.ids_N[is_here] - start
    block[places] = block[places].lerp(rows.values_ND[is_here].float(), scale)


def stored_blocks(base: Checkpoint, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield blocks of a tensor without adapter in `dtype`: the file's own values if training used these."""
    if base.is_as_stored(name) and base.dtype(name) == dtype:
        yield base.stored(name)
        return
    for block in base.row_blocks(name):
        yield _checked(block.to(dtype), name)


def open_pair(
    base_dir: Path | str, adapter_dir: Path | str, *, compute_dtype: str | None
) -> tuple[Checkpoint, Adapter]:
    """-> (base, adapter). Raises ModelError unless every adapter module has a base weight of its shape."""
    base = open_checkpoint(base_dir, compute_dtype=None if compute_dtype is None else DTYPES[compute_dtype])
    adapter = read_adapter(adapter_dir)
    problems = []
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{module}.weight": ("B @ A", factors.shape) for module, factors in adapter.factors.items()
    }
    shapes |= {name: ("its weight", tuple(tensor.shape)) for name, tensor in adapter.whole.items()}
    problems += [
        f"{name}: has new rows, but {base.folder} has no such weight" for name in adapter.rows if name not in base
    ]
    for name, (product, shape) in shapes.items():
        module = name.removesuffix(".weight")
        if name not in base.names:
            problems.append(f"{module}: {base.folder} has no {name}{_tied_hint(base, module)}")
        elif base.shape(name) != shape:
            problems.append(f"{module}: {product} is {list(shape)}, {name} is {list(base.shape(name))}")
        elif module == "lm_head" and base.config.get("tie_word_embeddings"):
            problems.append(f"{module}: the model ties it to its embedding, so loading would ignore a merged one")
    if problems:
        head = f"{adapter_dir}: the adapter was not trained on this base ({len(problems)} of {len(adapter)} modules)"
        raise ModelError("\n".join([head, *(f"  {problem}" for problem in problems)]))
    return base, adapter


def _out_dtype(base: Checkpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    own = base.dtype(name)
    return dtype if own.is_floating_point else own


def _checked(block: Tensor, name: str) -> Tensor:
    finite = torch.isfinite(block)
    if not bool(finite.all()):  # count only then: it takes 8 bytes per boolean
        count = block.numel() - int(finite.sum())
        raise ModelError(
            f"{name}: {count} values are not finite in {word_of(block.dtype)}; try --set merge.dtype=bf16 or fp32"
        )
    return block


def _check_disk(folder: Path, total_bytes: int) -> None:
    free = free_bytes(folder)
    if free < total_bytes:
        raise UserError(
            f"{folder.parent}: the merged model needs {format_bytes(total_bytes)}, but {format_bytes(free)} are free"
        )


def _write_config(base: Checkpoint, adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = {
        key: value for key, value in base.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    config["dtype"] = str(dtype).removeprefix("torch.")
    num_rows = max((adapter.shape_of(name, base.shape(name))[0] for name in adapter.rows), default=0)
    if num_rows:
        config["vocab_size"] = num_rows
    write_text_durably(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _warnings(base: Checkpoint, dtype: str) -> Iterator[str]:
    if dtype == "fp16":
        yield "fp16 holds values up to 65504: a model trained in bf16 may overflow when it runs in fp16"
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
