"""The quantized base as a file: written once, read by training, evaluation, merging and asking alike.

In:  a folder of 16-bit safetensors.  Out: CACHE/quantized/NAME-KEY, an ordinary transformers folder in bitsandbytes' own 4-bit
serialization (plain `AutoModelForCausalLM.from_pretrained` reads it), with a manifest of SHA-256 hashes.

Why a file: quantizing again is not reproducible (the offset of the double quantization is a mean, which CPU and CUDA may
round differently), and starting becomes fast. Tensors are read, quantized and written one at a time.

NF4 with double quantization (QLoRA section 3, arXiv 2305.14314) takes n/2 + n/64 + 4*ceil(n/64/256) bytes for n weights and a
few constants per tensor.
"""

import json
import math
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.model.bnb import bitsandbytes
from qlora_lite.model.manifest import MANIFEST_NAME, read_manifest, verify_manifest, write_manifest
from qlora_lite.model.published import LazyTensor, published_weights
from qlora_lite.model.safetensors_writer import ShardedWriter, TensorSpec
from qlora_lite.model.skeleton import empty_model
from qlora_lite.model.source import folder_fingerprint, load_config, read_config
from qlora_lite.model.staging import staged_folder

_VERSION = 2  # raise it when the artefact's bytes change
_BLOCK, _NESTED_BLOCK = 64, 256
_FACTS, _FACTS_BYTES = "quant_state.bitsandbytes__nf4", 256
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def quantize_base(source: Path, *, cache: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The artefact of the 16-bit model folder `source`; quantized on the first call, found again on later ones.

    `progress(done, total)` is called per tensor. Raises ModelError for a model that is damaged or not supported.
    """
    folder = cache / "quantized" / f"{source.name}-nf4-{folder_fingerprint(source)}-v{_VERSION}"
    if (folder / MANIFEST_NAME).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    config = read_config(source)
    _refuse_quantized(source, config)
    model = empty_model(load_config(source))
    weights = published_weights(source, model)
    with staged_folder(folder) as staging:
        _quantize_tensors(weights.tensors, staging, linear_weights(model), progress)
        config |= {"quantization_config": QUANTIZATION_CONFIG | _left_out(model), "dtype": "bfloat16"}
        config |= {"tie_word_embeddings": weights.is_tied}
        config.pop("torch_dtype", None)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for pattern in _COPIED:
            for path in source.glob(pattern):
                shutil.copyfile(path, staging / path.name)
        facts = {"quantization": "nf4, double quantization", "source": source.name, "num_vision": weights.num_vision}
        write_manifest(staging, facts)
    return folder


def verify_artefact(folder: Path) -> str:
    """The SHA-256 that names the artefact's weights, after every file's hash was checked. Raises ModelError for a damaged one."""
    problems = verify_manifest(folder)
    if problems:
        raise ModelError(
            f"the quantized base is damaged: {problems[0]}. Remove {folder} and run again: it is made anew from the original"
        )
    manifest = read_manifest(folder)
    assert manifest is not None  # verified above
    hashes = [
        str(entry["sha256"]) for name, entry in sorted(manifest["files"].items()) if name.endswith(".safetensors")
    ]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def _left_out(model: PreTrainedModel) -> dict[str, Any]:
    """The head keeps 16 bits. Said by name, because transformers guesses otherwise which linear layers those are."""
    head = model.get_output_embeddings()
    return {"llm_int8_skip_modules": [name for name, module in model.named_modules() if module is head]}


def _refuse_quantized(source: Path, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "?")
        raise ModelError(
            f"{source}: is already quantized ({method}), which is not supported yet. Give the 16-bit folder it was made from"
        )


def linear_weights(model: PreTrainedModel) -> frozenset[str]:
    """Names of the weights that are quantized: those of every linear layer but the head (QLoRA section 4)."""
    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return frozenset(f"{name}.weight" for name, module in modules if module is not head)


def _quantize_tensors(
    tensors: dict[str, LazyTensor],
    out: Path,
    linear: frozenset[str],
    progress: Callable[[int, int], None] | None,
) -> None:
    specs: dict[str, TensorSpec] = {}
    for name, read in tensors.items():
        shape = read.shape()
        specs |= _quantized_specs(name, shape) if name in linear else {name: TensorSpec(shape, torch.bfloat16)}
    with ShardedWriter(out, specs) as writer:
        for done, (name, read) in enumerate(tensors.items()):
            value = read.value().to(torch.bfloat16)
            for part, tensor in (_quantized(name, value) if name in linear else {name: value}).items():
                writer.write(part, [tensor])
            if progress is not None:
                progress(done + 1, len(tensors))


def _quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if torch.cuda.is_available():
        weight = weight.cuda()
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    parts = {name: packed} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    facts = parts[f"{name}.{_FACTS}"]
    assert facts.numel() <= _FACTS_BYTES, f"{name}: quant state of {facts.numel()} bytes"
    padding = torch.full((_FACTS_BYTES - facts.numel(),), ord(" "), dtype=torch.uint8, device=facts.device)
    parts[f"{name}.{_FACTS}"] = torch.cat([facts, padding])
    return {part: tensor.cpu() for part, tensor in parts.items()}


def _quantized_specs(name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """What `_quantized` will give, by shape. The quant state's JSON varies in length, so it is filled up with spaces."""
    num_weights = math.prod(shape)
    blocks = math.ceil(num_weights / _BLOCK)
    return {
        name: TensorSpec((math.ceil(num_weights / 2), 1), torch.uint8),
        f"{name}.absmax": TensorSpec((blocks,), torch.uint8),
        f"{name}.quant_map": TensorSpec((16,), torch.float32),
        f"{name}.nested_absmax": TensorSpec((math.ceil(blocks / _NESTED_BLOCK),), torch.float32),
        f"{name}.nested_quant_map": TensorSpec((256,), torch.float32),
        f"{name}.{_FACTS}": TensorSpec((_FACTS_BYTES,), torch.uint8),
    }
