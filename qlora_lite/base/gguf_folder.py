"""A GGUF file -> a safetensors folder in the cache, one tensor at a time: the dense model is never complete in memory.

transformers refuses a GGUF together with a bitsandbytes config, and its own conversion of this architecture builds the dense
model first. Config and tokenizer come from transformers; tensors from the `gguf` package (format: ggml-org/ggml, docs/gguf.md).

Surprising: llama.cpp stores the rows of the query and key projections in another order (rotary pairs adjacent); the conversion
restores the order that transformers' rotary embedding expects.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qlora_lite.base.finite import refuse_not_finite
from qlora_lite.base.gguf_head import check_gguf_head
from qlora_lite.errors import ModelError
from qlora_lite.files.made_once import make_folder_once
from qlora_lite.files.manifest import MANIFEST_NAME, write_manifest
from qlora_lite.files.safetensors_writer import ShardedWriter, TensorSpec
from qlora_lite.files.staging import short_name
from qlora_lite.foreign import foreign

_VERSION = 2  # increase it when the converted folder changes
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = ("rope_freqs.weight",)  # derived from the config


def convert_gguf(path: Path, *, cache: Path) -> Path:
    """Return the converted folder of the GGUF file `path`, made on the first call. Raises ModelError for an unusable file."""
    stat = path.stat()
    key = sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {_VERSION}".encode()).hexdigest()[:16]
    folder = cache / "converted" / f"{short_name(path.stem)}-{key}"

    def make(staging: Path) -> None:
        _convert(path, staging)
        write_manifest(staging, {"source": path.name})

    return make_folder_once(folder, is_made=(folder / MANIFEST_NAME).is_file, make=make)


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with foreign(lambda reason: ModelError(f"{path}: not a readable GGUF file ({reason})")):
        check_gguf_head(path)
        reader = _Reader(str(path))
        architecture = reader.fields["general.architecture"].contents()
        if architecture != "llama":
            raise ModelError(f"{path}: GGUF architecture {architecture!r} is not supported yet; supported: llama")
        with _read_once(path, reader):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tensors = {_hf_name(path, tensor.name): tensor for tensor in reader.tensors if tensor.name not in _IGNORED}
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    specs = {name: TensorSpec(tuple(int(n) for n in reversed(t.shape)), torch.bfloat16) for name, t in tensors.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, tensor in tensors.items():
            values = _dequantized(path, name, tensor, config)
            refuse_not_finite(values, f"{tensor.name} ({name})", where=path)
            writer.write(name, [values])


class _Reader(gguf.GGUFReader):
    """With the file as an array of numpy's own: slices of a `memmap` take several times as long, and each token is one."""

    @property
    def data(self) -> np.ndarray:
        return self._array

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._array = np.asarray(mapped)


@contextmanager
def _read_once(path: Path, reader: _Reader) -> Iterator[None]:
    """Inside, transformers, which reads the file twice, gets what was read already; without this it takes seconds longer."""
    real = gguf.GGUFReader
    gguf.GGUFReader = lambda other, *rest: reader if Path(other) == path else real(other, *rest)
    try:
        yield
    finally:
        gguf.GGUFReader = real


def _dequantized(path: Path, name: str, stored: Any, config: Any) -> torch.Tensor:
    with foreign(lambda reason: ModelError(f"{path}: not a readable GGUF file ({name}: {reason})")):
        values = gguf.dequantize(stored.data, stored.tensor_type)
        tensor = _in_hf_order(name, values, config).to(torch.bfloat16)
        return tensor.clone(memory_format=torch.contiguous_format)  # a single value may have a stride of 0


def _hf_name(path: Path, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match.group(2) not in _NAMES:
        raise ModelError(f"{path}: tensor {name} has no place in a Llama model; only Llama GGUF files are supported")
    layer, part, kind = match.groups()
    prefix = f"model.layers.{layer}." if layer is not None else ""
    return f"{prefix}{_NAMES[part]}.{kind}"


def _in_hf_order(name: str, values: np.ndarray, config: Any) -> torch.Tensor:
    """Undo llama.cpp's row order of q_proj and k_proj: [heads, d/2, 2, in] -> [heads, 2, d/2, in]."""
    tensor = torch.from_numpy(np.array(values))  # a copy: values may be a view of the file
    if ".q_proj." in name or ".k_proj." in name:
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        half = tensor.shape[0] // heads // 2
        return tensor.reshape(heads, half, 2, -1).transpose(1, 2).reshape(tensor.shape)
    return tensor
