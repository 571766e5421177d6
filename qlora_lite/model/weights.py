"""Put the tensors of a model folder into an empty model: 16-bit ones unchanged, quantized ones as bitsandbytes' layers.

transformers' own loader replaces only layers whose type is exactly `nn.Linear`: it leaves Falcon, whose layers are a subclass, in 16
bits. Here a layer is replaced exactly when the files have its quantized weight. Values are copied, because files are memory-mapped and
tensors in them are not aligned for kernels.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.finite import refuse_not_finite
from qlora_lite.base.published import open_tensors
from qlora_lite.base.quantization import OUTLIERS, SCALES, parts_of, read_quant_state
from qlora_lite.errors import ModelError
from qlora_lite.model.frozen_int8 import FrozenInt8
from qlora_lite.model.streaming import Homes, Source


def fill_model(
    model: PreTrainedModel, folder: Path, *, device: str, compute: torch.dtype, homes: Homes | None = None
) -> None:
    """Read every weight of `model` (see base/skeleton.py) from the quantized `folder`, whose names are the model's own.

    Quantized weights are dequantized to `compute` at each use; all others are stored in it. `homes` takes those that do not stay on the
    device. Raises ModelError for weights that are missing, have no place in the model, or are not finite.
    """
    stored = dict(open_tensors(folder))
    parts = parts_of(stored)
    plain = stored.keys() - parts.keys() - {part for names in parts.values() for part in names}
    wanted = model.state_dict().keys()
    tied = model.all_tied_weights_keys.keys() - plain
    missing, unknown = wanted - plain - parts.keys() - tied, (plain | parts.keys()) - wanted
    if missing or unknown:
        first = min(missing | unknown)
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing and {len(unknown)} have no place, first {first}"
        )
    fill_plain(model, {name: stored[name] for name in plain}, device=device, compute=compute, where=folder)

    def read() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, constants in sorted(parts.items()):
            yield name, {part: stored[part].value().clone() for part in (name, *constants)}
            if homes is not None:
                homes.take(name, stored)

    fill_quantized(model, read(), device=device, compute=compute, where=folder)


def fill_quantized(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, dict[str, torch.Tensor]]],
    *,
    device: str,
    compute: torch.dtype,
    where: Path | str = "the model",
) -> None:
    """Replace linear layers by bitsandbytes' layers; `weights` are names with the tensors from `Quantization.quantize`."""
    is_int8 = False
    for name, tensors in weights:
        is_int8 = tensors[name].dtype == torch.int8
        for part, values in tensors.items():
            if part != name:  # packed weights are bits of any storage type; only scales and tables are numbers
                refuse_not_finite(values, part, where=where)
        put = _put_int8 if is_int8 else _put_4_bit
        put(model, name, tensors, device=device, compute=compute)
    # peft reads these two
    model.is_loaded_in_4bit = any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in model.modules())
    model.is_loaded_in_8bit = is_int8 and not model.is_loaded_in_4bit


def fill_plain(
    model: PreTrainedModel,
    tensors: Mapping[str, Source],
    *,
    device: str,
    compute: torch.dtype,
    where: Path | str = "the model",
    homes: Homes | None = None,
) -> None:
    """Put 16-bit `tensors`, by parameter name, into `model` in the type `compute`; buffers go to the device too."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        value = tensor.value()
        _check_shape(name, value.shape, module.get_parameter(attribute))
        parameter = torch.nn.Parameter(value.to(device, compute, copy=True), requires_grad=False)
        refuse_not_finite(parameter.detach(), name, where=where, as_read=value)
        module.register_parameter(attribute, parameter)
        if homes is not None:
            homes.take(name, tensors)
    for module in model.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    model.tie_weights()


def _put_4_bit(
    model: PreTrainedModel,
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    device: str,
    compute: torch.dtype,
) -> None:
    linear = _linear(model, name)
    if device == "cpu" and linear.in_features % 64 == 32:
        # bitsandbytes 0.50's AVX512 kernel reads the wrong absmax there; remove when upstream fixes it
        raise ModelError(
            f"{name}: bitsandbytes computes 4-bit layers of width {linear.in_features} (32 more than a multiple of 64) "
            "wrongly on the CPU. Use device: cuda for this model"
        )
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute, device="meta"
    )
    layer.compute_type_is_set = True
    state = read_quant_state(
        name, tensors[name], {part: t for part, t in tensors.items() if part != name}
    )  # checks sizes
    if state.nested:
        refuse_not_finite(state.offset, "the mean of its scales", where=name)
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        data=tensors.pop(name), quantized_stats=tensors, device=device, module=layer
    )
    _check_shape(name, layer.weight.quant_state.shape, linear.weight)
    layer.weight.quant_state.dtype = compute  # bitsandbytes' default type for dequantization
    _replace(model, name, layer, bias=linear.bias)


def _put_int8(
    model: PreTrainedModel,
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    device: str,
    compute: torch.dtype,
) -> None:
    linear = _linear(model, name)
    layer = FrozenInt8(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device="meta"
    )
    values, scales = tensors[name].to(device), tensors[f"{name.removesuffix('.weight')}.{SCALES}"].to(device)
    _check_shape(name, values.shape, linear.weight)
    _check_shape(f"{name}'s {SCALES}", scales.shape, linear.weight[:, 0])
    layer.weight = bitsandbytes.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    _replace(model, name, layer, bias=linear.bias)


def _linear(model: PreTrainedModel, name: str) -> torch.nn.Linear:
    linear = model.get_submodule(name.removesuffix(".weight"))
    if not isinstance(linear, torch.nn.Linear):
        raise ModelError(
            f"{name}: is quantized in the file, but belongs to a {type(linear).__name__} in the model, not to a linear layer"
        )
    return linear


def _check_shape(name: str, shape: torch.Size, expected: torch.Tensor) -> None:
    if tuple(shape) != tuple(expected.shape):
        raise ModelError(f"{name}: has shape {list(shape)}, the model's is {list(expected.shape)}")


def _replace(model: PreTrainedModel, name: str, layer: torch.nn.Linear, *, bias: torch.nn.Parameter | None) -> None:
    """Replace the model's own layer by the quantized `layer`; a bias stays, in 16 bits."""
    layer.register_parameter("bias", bias)
    model.set_submodule(name.removesuffix(".weight"), layer)
