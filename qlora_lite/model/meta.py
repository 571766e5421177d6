"""A whole model on the meta device, including quantized layers: the shapes and types of a loaded model, without values.

It needs only a config, where loading (weights.py) needs files; training code can be rehearsed on it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lite.base.artefact import linear_weights
from qlora_lite.base.bnb import bitsandbytes, keep_weights_unpacked
from qlora_lite.base.quantization import OUTLIERS, SCALES, Quantization
from qlora_lite.base.skeleton import empty_model, model_class
from qlora_lite.model.frozen_int8 import FrozenInt8
from qlora_lite.model.load import attention_of, switch_off_dropout


def meta_model(
    config: PreTrainedConfig, *, quantization: Quantization | None, compute: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The frozen model of `config`, with its linear layers (except the head) stored as `quantization`. Raises ModelError."""
    switch_off_dropout(config)
    model = empty_model(config, dtype=compute, attn_implementation=attention_of(model_class(config)))
    for name in sorted(linear_weights(model)) if quantization is not None else ():
        assert quantization is not None
        _put(model, name, quantization, compute=compute)
    model.is_loaded_in_4bit = quantization is not None and quantization.kind != "int8"
    model.is_loaded_in_8bit = quantization is not None and quantization.kind == "int8"
    for module in model.modules():
        module._buffers.update({name: b.to("meta") for name, b in module._buffers.items() if b is not None})
    keep_weights_unpacked(model)
    return model.requires_grad_(False).eval()


def _put(model: PreTrainedModel, name: str, quantization: Quantization, *, compute: torch.dtype) -> None:
    linear: Any = model.get_submodule(name.removesuffix(".weight"))
    parts = {
        part: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for part, spec in quantization.specs(name, tuple(linear.weight.shape)).items()
    }
    make = _int8_layer if quantization.kind == "int8" else _four_bit_layer
    layer = make(linear, name, parts, quantization, compute)
    layer.register_parameter("bias", linear.bias)
    model.set_submodule(name.removesuffix(".weight"), layer)


def _four_bit_layer(
    linear: torch.nn.Linear, name: str, parts: dict[str, torch.Tensor], quantization: Quantization, compute: torch.dtype
) -> torch.nn.Module:
    state = four_bit_state(name, parts, linear.weight.shape, quantization, compute)
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute, device="meta"
    )
    layer.compute_type_is_set = True
    layer.weight = bitsandbytes.nn.Params4bit(
        parts[name], requires_grad=False, quant_state=state, quant_type=quantization.kind, bnb_quantized=True,
        compress_statistics=quantization.double_quant, module=layer,
    )  # fmt: skip
    return layer


def four_bit_state(
    name: str, parts: Mapping[str, torch.Tensor], shape: torch.Size, quantization: Quantization, compute: torch.dtype
) -> Any:
    """bitsandbytes' state of a 4-bit weight [out, in], from `parts` (`Quantization.specs`), possibly on meta."""
    state_of: Any = bitsandbytes.functional.QuantState
    nested = None
    if quantization.double_quant:
        nested = state_of(
            parts[f"{name}.nested_absmax"], code=parts[f"{name}.nested_quant_map"], blocksize=256, dtype=torch.float32
        )
    return state_of(
        parts[f"{name}.absmax"],
        shape=shape,
        code=parts[f"{name}.quant_map"],
        blocksize=64,
        quant_type=quantization.kind,
        dtype=compute,
        offset=torch.empty((), dtype=torch.float32, device="meta") if nested is not None else None,
        state2=nested,
    )


def _int8_layer(
    linear: torch.nn.Linear, name: str, parts: dict[str, torch.Tensor], quantization: Quantization, compute: torch.dtype
) -> torch.nn.Module:
    layer = FrozenInt8(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device="meta"
    )
    values, scales = parts[name], parts[f"{name.removesuffix('.weight')}.{SCALES}"]
    layer.weight = bitsandbytes.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    return layer
