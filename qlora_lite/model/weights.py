"""Put the tensors of a model folder into an empty model: 16-bit ones as they are, 4-bit ones as bitsandbytes' layers.

transformers' own loader replaces only layers whose type is exactly `nn.Linear`: it leaves Falcon, whose layers are a subclass,
in 16 bits. Here a layer is replaced when the files hold its quantized weight, and nothing else decides. Values are copied: files are
memory-mapped, and where they begin in a file is where no kernel would have put them.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.model.bnb import bitsandbytes
from qlora_lite.model.published import LazyTensor, open_tensors

QUANT_STATE = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
QUANT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *QUANT_STATE)


def fill_model(model: PreTrainedModel, folder: Path, *, device: str, compute: torch.dtype) -> None:
    """Read every weight of `model` (see skeleton.py) from `folder`'s safetensors, whose names are the model's own.

    4-bit weights are dequantized to `compute` whenever they are used, all others are stored in it. Raises ModelError for
    weights that are missing or have no place.
    """
    stored = dict(open_tensors(folder))
    quantized = {name.removesuffix(end) for name in stored for end in QUANT_STATE if name.endswith(end)}
    parts = {name: _parts(name, stored) for name in quantized}
    plain = stored.keys() - quantized - {part for found in parts.values() for part in found}
    wanted = model.state_dict().keys()
    tied = model.all_tied_weights_keys.keys() - plain
    missing, unknown = wanted - plain - quantized - tied, (plain | quantized) - wanted
    if missing or unknown:
        some = min(missing | unknown)
        raise ModelError(f"{folder}: {len(missing)} weights are missing and {len(unknown)} have no place, first {some}")
    for name in plain:
        _set(model, name, torch.nn.Parameter(stored[name].value().to(device, compute, copy=True), requires_grad=False))
    for name in quantized:
        layer = _four_bit_layer(model, name.removesuffix(".weight"), compute=compute, device=device)
        layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
            data=stored[name].value().clone(),
            quantized_stats={part: stored[part].value().clone() for part in parts[name]},
            device=device,
            module=layer,
        )
    for module in model.modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    model.tie_weights()
    model.is_loaded_in_4bit = bool(quantized)  # peft asks for it


def _parts(name: str, stored: dict[str, LazyTensor]) -> list[str]:
    return [name + part for part in QUANT_PARTS if name + part in stored]


def _set(model: PreTrainedModel, name: str, parameter: torch.nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    expected = module.get_parameter(attribute).shape
    if parameter.shape != expected:
        raise ModelError(f"{name}: has shape {list(parameter.shape)}, the model's is {list(expected)}")
    module.register_parameter(attribute, parameter)


def _four_bit_layer(
    model: PreTrainedModel, name: str, *, compute: torch.dtype, device: str
) -> "bitsandbytes.nn.Linear4bit":
    """The linear layer `name`, replaced by an empty 4-bit one that keeps its bias."""
    linear = model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear), f"{name} is a {type(linear).__name__}"
    if device == "cpu" and linear.in_features % 64 == 32:
        # bitsandbytes 0.50's AVX512 kernel takes the wrong absmax there; can go when upstream reads it right
        raise ModelError(
            f"{name}: bitsandbytes computes 4-bit layers of width {linear.in_features} (32 more than a multiple of 64) "
            "wrongly on the CPU. Use device: cuda for this model"
        )
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute, device="meta"
    )
    layer.bias, layer.compute_type_is_set = linear.bias, True
    model.set_submodule(name, layer)
    return layer
