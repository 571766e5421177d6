"""The quantized base as a folder: written once, read by training, evaluation, merging and asking.

In:  a folder of 16-bit safetensors.  Out: CACHE/quantized/NAME-KEY, an ordinary transformers folder in bitsandbytes' own 4-bit
serialization (plain `AutoModelForCausalLM.from_pretrained` reads it), with a manifest of SHA-256 hashes.

Why stored: quantizing twice is not reproducible (the offset of the double quantization is a mean, which CPU and CUDA may
round differently), and runs start faster. Tensors are read, quantized and written one at a time.

quantization.py defines how one weight is stored.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lite.base.companions import copy_companions
from qlora_lite.base.finite import refuse_not_finite
from qlora_lite.base.published import (
    LazyTensor,
    PublishedWeights,
    open_tensors,
    published_weights,
    quantized_weights,
)
from qlora_lite.base.quantization import Quantization, parts_of, stored_quantization
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import folder_fingerprint, load_config, read_config
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import CONFIG_FILE
from qlora_lite.files.made_once import make_folder_once
from qlora_lite.files.manifest import (
    MANIFEST_NAME,
    read_manifest,
    verify_manifest,
    weights_sha256,
    write_manifest,
)
from qlora_lite.files.names import inside
from qlora_lite.files.safetensors_writer import ShardedWriter, TensorSpec
from qlora_lite.files.staging import short_name

_VERSION = 3  # increase it when the artefact's bytes change
NF4 = Quantization("nf4")


def quantize_base(
    source: Path,
    *,
    cache: Path,
    quantization: Quantization = NF4,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the artefact of the 16-bit model folder `source`; the first call quantizes it, later calls reuse it.

    A folder already quantized by bitsandbytes is used unchanged: quantizing twice would lose precision twice.
    `progress(done, total)` is called per tensor. Raises ModelError for a damaged or unsupported model.
    """
    name = f"{short_name(source.name)}-{quantization.file_name}-{folder_fingerprint(source)}-v{_VERSION}"
    folder = cache / "quantized" / name
    return make_folder_once(
        folder,
        is_made=(folder / MANIFEST_NAME).is_file,
        make=lambda staging: _write_artefact(source, staging, quantization, progress),
    )


def _write_artefact(
    source: Path, staging: Path, quantization: Quantization, progress: Callable[[int, int], None] | None
) -> None:
    config = read_config(source)
    stored = stored_quantization(config, source)
    model = empty_model(load_config(source))
    if stored is not None:
        weights = _take_over(source, staging, model, stored, quantization)
        names = frozenset(parts_of(weights.tensors))
        config["quantization_config"] |= _left_out(model, names)
    else:
        weights = published_weights(source, model)
        names = linear_weights(model)
        _quantize_tensors(weights.tensors, staging, names, quantization, progress, where=source)
        config |= {"quantization_config": quantization.config() | _left_out(model, names), "dtype": "bfloat16"}
        config.pop("torch_dtype", None)
    config |= {"tie_word_embeddings": weights.is_tied}
    facts = {"num_vision": weights.num_vision, "taken_over": stored is not None}
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companions(source, staging)
    write_manifest(staging, {"quantization": str(quantization), "source": source.name, **facts})


def _take_over(
    source: Path, out: Path, model: PreTrainedModel, stored: Quantization, asked: Quantization
) -> PublishedWeights:
    """Take over the weights of a quantized folder: link its files (or copy them, across file systems) if they use the model's own
    tensor names, else write them under these names.
    """
    if stored != asked:
        raise ModelError(
            f"{source}: is already quantized ({stored}), but the recipe asks for {asked}. A quantized base is used unchanged: "
            f"use --set model.quantization={stored.kind} --set model.double_quant={str(stored.double_quant).lower()}"
        )
    weights = quantized_weights(source, model)
    if not parts_of(weights.tensors):
        raise ModelError(
            f"{source}: config.json says {stored}, but no weight is quantized (transformers leaves some models, such as Falcon, "
            "in 16 bits). Remove quantization_config from config.json; the base is then quantized here"
        )
    left_out = dict(open_tensors(source)).keys() - {tensor.key for tensor in weights.tensors.values()}
    has_own_names = all(name == tensor.key for name, tensor in weights.tensors.items())
    if has_own_names and left_out <= model.all_tied_weights_keys.keys():
        _link(source, out)
    else:
        _copy_tensors(weights.tensors, out)
    return weights


def _link(source: Path, out: Path) -> None:
    for path in source.glob("*.safetensors*"):
        inside(source, path.name, named_by=str(source))
        try:
            os.link(path.resolve(), out / path.name)
        except OSError:
            shutil.copyfile(path, out / path.name)


def _copy_tensors(tensors: dict[str, LazyTensor], out: Path) -> None:
    specs = {name: TensorSpec(tensor.shape(), tensor.value().dtype) for name, tensor in tensors.items()}
    with ShardedWriter(out, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, [tensor.value()])


def verify_artefact(folder: Path) -> str:
    """Verify every file's hash and return the SHA-256 of the artefact's weights. Raises ModelError for a damaged artefact."""
    problems = verify_manifest(folder)
    if problems:
        raise ModelError(
            f"the quantized base is damaged: {problems[0]}. Remove {folder} and rerun: the base is quantized again"
        )
    manifest = read_manifest(folder)
    assert manifest is not None  # verified above
    return weights_sha256(manifest)


def _left_out(model: PreTrainedModel, quantized: frozenset[str]) -> dict[str, Any]:
    """List the linear layers that keep 16 bits by name, because transformers would guess them differently."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {"llm_int8_skip_modules": [name for name in linear if f"{name}.weight" not in quantized]}


def linear_weights(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the weights to quantize: those of every linear layer but the head (QLoRA section 4)."""
    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return frozenset(f"{name}.weight" for name, module in modules if module is not head)


def _quantize_tensors(
    tensors: dict[str, LazyTensor],
    out: Path,
    linear: frozenset[str],
    quantization: Quantization,
    progress: Callable[[int, int], None] | None,
    *,
    where: Path,
) -> None:
    specs: dict[str, TensorSpec] = {}
    for name, read in tensors.items():
        shape = read.shape()
        specs |= quantization.specs(name, shape) if name in linear else {name: TensorSpec(shape, torch.bfloat16)}
    with ShardedWriter(out, specs) as writer:
        for done, (name, read) in enumerate(tensors.items()):
            stored = read.value()
            value = stored.to(torch.bfloat16)
            refuse_not_finite(value, name, where=where, as_read=stored)
            for part, tensor in (quantization.quantize(name, value) if name in linear else {name: value}).items():
                writer.write(part, [tensor])
            if progress is not None:
                progress(done + 1, len(tensors))
