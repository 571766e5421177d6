"""Storage of one weight in few bits, with the tensors and names of bitsandbytes' and transformers' own files.

    nf4, fp4   4 bits a weight and one scale (absmax) a block of 64; two weights a byte. NF4's 16 values are the quantiles of a
               normal distribution (QLoRA section 3, arXiv 2305.14314), FP4's are a sign, two exponent bits and a mantissa bit.
               Double quantization stores the scales in 8 bits, in blocks of 256 around their mean:
               n/2 + n/64 + 4*ceil(n/64/256) bytes for n weights and a few constants, without it n/2 + 4*n/64.
    int8       8 bits a weight and one scale (SCB) a row: weight = CB * SCB / 127 (LLM.int8, arXiv 2208.07339).

Surprising: the facts of a quant state are JSON of varying length, so they are padded with spaces to `_FACTS_BYTES`; all sizes
are then known before a weight is read.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.accelerator import fastest_device
from qlora_lite.errors import ModelError
from qlora_lite.files.safetensors_writer import TensorSpec
from qlora_lite.foreign import foreign

BLOCK, NESTED_BLOCK = 64, 256
QUANT_STATE = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
QUANT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *QUANT_STATE)
SCALES, FORMAT = "SCB", "weight_format"  # beside an int8 `weight` of the same module
OUTLIERS = 6.0  # activations above this are multiplied in 16 bits (LLM.int8 section 3.2)
_FACTS_BYTES = 256
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # supported by bitsandbytes


@dataclass(frozen=True)
class Quantization:
    """One way to store a linear layer's weight. `kind` is nf4, fp4 or int8; int8 has no double quantization."""

    kind: str
    double_quant: bool = True

    def __str__(self) -> str:
        return f"{self.kind}, double quantization" if self.double_quant and self.kind != "int8" else self.kind

    @property
    def file_name(self) -> str:
        """The part of a folder name for this quantization."""
        return self.kind if self.double_quant or self.kind == "int8" else f"{self.kind}-single"

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config` for a config.json."""
        if self.kind == "int8":
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "llm_int8_threshold": OUTLIERS,
                "llm_int8_has_fp16_weight": False,
            }
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the specs of the tensors that `quantize` makes from the weight `name` of this shape [out, in]."""
        if self.kind == "int8":
            module = name.removesuffix(".weight")
            return {
                name: TensorSpec(shape, torch.int8),
                f"{module}.{SCALES}": TensorSpec((shape[0],), torch.float32),
                f"{module}.{FORMAT}": TensorSpec((), torch.uint8),
            }
        num_weights = math.prod(shape)
        blocks = math.ceil(num_weights / BLOCK)
        specs = {
            name: TensorSpec((math.ceil(num_weights / 2), 1), torch.uint8),
            f"{name}.absmax": TensorSpec((blocks,), torch.uint8 if self.double_quant else torch.float32),
            f"{name}.quant_map": TensorSpec((16,), torch.float32),
            f"{name}.quant_state.bitsandbytes__{self.kind}": TensorSpec((_FACTS_BYTES,), torch.uint8),
        }
        if self.double_quant:
            specs[f"{name}.nested_absmax"] = TensorSpec((math.ceil(blocks / NESTED_BLOCK),), torch.float32)
            specs[f"{name}.nested_quant_map"] = TensorSpec((256,), torch.float32)
        return specs

    def quantize(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize the 16-bit `weight` [out, in] -> the tensors to store, by name; computed on the accelerator if available."""
        weight = weight.to(fastest_device())
        parts = self._int8(name, weight) if self.kind == "int8" else self._four_bit(name, weight)
        return {part: tensor.cpu() for part, tensor in parts.items()}

    def _int8(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        values, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {name: values, f"{module}.{SCALES}": scales, f"{module}.{FORMAT}": torch.tensor(0, dtype=torch.uint8)}

    def _four_bit(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.kind
        )
        parts = {name: packed} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        key = f"{name}.quant_state.bitsandbytes__{self.kind}"
        facts = parts[key]
        assert facts.numel() <= _FACTS_BYTES, f"{name}: quant state of {facts.numel()} bytes"
        padding = torch.full((_FACTS_BYTES - facts.numel(),), ord(" "), dtype=torch.uint8, device=facts.device)
        return parts | {key: torch.cat([facts, padding])}


def stored_quantization(config: dict[str, Any], folder: Any) -> Quantization | None:
    """Return the quantization in a folder's config.json; None for 16 bits or more.

    Raises ModelError for any method but bitsandbytes (GPTQ, AWQ, ...), by name: their weights are not supported.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict) or stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ModelError(
            f"{folder}: quantized with {method}, which is not supported. Use a bitsandbytes folder or the 16-bit original"
        )
    if stored.get("load_in_8bit"):
        return Quantization("int8", double_quant=False)
    if not stored.get("load_in_4bit"):
        raise ModelError(f"{folder}: quantization_config sets neither load_in_4bit nor load_in_8bit")
    return Quantization(
        stored.get("bnb_4bit_quant_type", "fp4"), double_quant=stored.get("bnb_4bit_use_double_quant", False)
    )


def read_quant_state(name: str, packed: torch.Tensor, parts: dict[str, torch.Tensor]) -> Any:
    """Build bitsandbytes' quant state, on the CPU, of the packed 4-bit weight `name` from the tensors in `parts`, which is emptied.

    Raises ModelError for tensors that do not match: the kernels trust the sizes and would read past the end of a tensor.
    """
    with foreign(lambda reason: ModelError(f"{name}: its quantization constants cannot be read ({reason})")):
        state = bitsandbytes.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        num_weights = math.prod(state.shape)
        num_blocks, scale = -(-num_weights // state.blocksize), torch.float32
        expected = [(state.absmax, num_blocks, torch.uint8 if state.nested else scale), (state.code, 16, scale)]
        if state.nested:
            inner = state.state2
            expected += [(inner.absmax, -(-num_blocks // inner.blocksize), scale), (inner.code, 256, scale)]
        fits = all((tensor.numel(), tensor.dtype) == (number, dtype) for tensor, number, dtype in expected)
        if not (fits and packed.nbytes == -(-num_weights // 2) and num_weights > 0 and state.blocksize in _BLOCKS):
            raise ValueError(f"they do not match a weight of shape {list(state.shape)} in {packed.nbytes:,} bytes")
    return state


def parts_of(names: Any) -> dict[str, list[str]]:
    """Tensor names of a file -> {quantized weight: the names of its other tensors}."""
    present = set(names)
    four_bit = {name.removesuffix(end) for name in present for end in QUANT_STATE if name.endswith(end)}
    parts = {name: [name + part for part in QUANT_PARTS if name + part in present] for name in four_bit}
    for scales in (name for name in present if name.endswith(f".{SCALES}")):
        module = scales.removesuffix(f".{SCALES}")
        parts[f"{module}.weight"] = [name for name in (scales, f"{module}.{FORMAT}") if name in present]
    return parts
