"""The quantized base as a file: written once, read by training, evaluation, merging and asking alike.

In:  a folder of 16-bit safetensors.  Out: CACHE/quantized/NAME-KEY, an ordinary transformers folder in bitsandbytes' own 4-bit
serialization (plain `AutoModelForCausalLM.from_pretrained` reads it), with a manifest of SHA-256 hashes.

Why a file: quantizing again is not reproducible (the offset of the double quantization is a mean, which CPU and CUDA may
round differently), and starting becomes fast. Tensors are read, quantized and written one at a time.

How a weight is stored is quantization.py's business.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.model.companions import copy_companions
from qlora_lite.model.manifest import (
    MANIFEST_NAME,
    read_manifest,
    verify_manifest,
    weights_sha256,
    write_manifest,
)
from qlora_lite.model.published import LazyTensor, published_weights
from qlora_lite.model.quantization import Quantization, stored_quantization
from qlora_lite.model.safetensors_writer import ShardedWriter, TensorSpec
from qlora_lite.model.skeleton import empty_model
from qlora_lite.model.source import folder_fingerprint, load_config, read_config
from qlora_lite.model.staging import staged_folder

_VERSION = 2  # raise it when the artefact's bytes change
NF4 = Quantization("nf4")


def quantize_base(
    source: Path,
    *,
    cache: Path,
    quantization: Quantization = NF4,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The artefact of the 16-bit model folder `source`; quantized on the first call, found again on later ones.

    A folder that bitsandbytes has quantized already is used as it is: quantizing it again would lose twice.
    `progress(done, total)` is called per tensor. Raises ModelError for a model that is damaged or not supported.
    """
    name = f"{source.name}-{quantization.file_name}-{folder_fingerprint(source)}-v{_VERSION}"
    folder = cache / "quantized" / name
    if (folder / MANIFEST_NAME).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    config = read_config(source)
    stored = stored_quantization(config, source)
    with staged_folder(folder) as staging:
        if stored is not None:
            facts = _take_over(source, staging, stored, quantization)
        else:
            model = empty_model(load_config(source))
            weights = published_weights(source, model)
            _quantize_tensors(weights.tensors, staging, linear_weights(model), quantization, progress)
            config |= {"quantization_config": quantization.config() | _left_out(model), "dtype": "bfloat16"}
            config |= {"tie_word_embeddings": weights.is_tied}
            config.pop("torch_dtype", None)
            facts = {"num_vision": weights.num_vision}
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_companions(source, staging)
        write_manifest(staging, {"quantization": str(quantization), "source": source.name, **facts})
    return folder


def _take_over(source: Path, out: Path, stored: Quantization, asked: Quantization) -> dict[str, Any]:
    """Link (or copy, across file systems) the weights of a folder that is quantized already."""
    if stored != asked:
        raise ModelError(
            f"{source}: is already quantized ({stored}), and {asked} was asked for. It is used as it is, never quantized again: "
            f"use --set model.quantization={stored.kind} --set model.double_quant={str(stored.double_quant).lower()}"
        )
    for path in source.glob("*.safetensors*"):
        try:
            os.link(path.resolve(), out / path.name)
        except OSError:
            shutil.copyfile(path, out / path.name)
    return {"taken_over": True}


def verify_artefact(folder: Path) -> str:
    """The SHA-256 that names the artefact's weights, after every file's hash was checked. Raises ModelError for a damaged one."""
    problems = verify_manifest(folder)
    if problems:
        raise ModelError(
            f"the quantized base is damaged: {problems[0]}. Remove {folder} and run again: it is made anew from the original"
        )
    manifest = read_manifest(folder)
    assert manifest is not None  # verified above
    return weights_sha256(manifest)


def _left_out(model: PreTrainedModel) -> dict[str, Any]:
    """The head keeps 16 bits. Said by name, because transformers guesses otherwise which linear layers those are."""
    head = model.get_output_embeddings()
    return {"llm_int8_skip_modules": [name for name, module in model.named_modules() if module is head]}


def linear_weights(model: PreTrainedModel) -> frozenset[str]:
    """Names of the weights that are quantized: those of every linear layer but the head (QLoRA section 4)."""
    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return frozenset(f"{name}.weight" for name, module in modules if module is not head)


def _quantize_tensors(
    tensors: dict[str, LazyTensor],
    out: Path,
    linear: frozenset[str],
    quantization: Quantization,
    progress: Callable[[int, int], None] | None,
) -> None:
    specs: dict[str, TensorSpec] = {}
    for name, read in tensors.items():
        shape = read.shape()
        specs |= quantization.specs(name, shape) if name in linear else {name: TensorSpec(shape, torch.bfloat16)}
    with ShardedWriter(out, specs) as writer:
        for done, (name, read) in enumerate(tensors.items()):
            value = read.value().to(torch.bfloat16)
            for part, tensor in (quantization.quantize(name, value) if name in linear else {name: value}).items():
                writer.write(part, [tensor])
            if progress is not None:
                progress(done + 1, len(tensors))
