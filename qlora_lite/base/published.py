"""The weights of a published checkpoint, by the names of the model's own modules.

Published files differ from the output of `save_pretrained`: BLOOM's keys lack a prefix, GPT-NeoX names its head `embed_out` and
stores attention masks, Llama 2 stores rotary frequencies, Gemma 3 wraps its language model beside a vision tower. Keys go through
transformers' own conversion mapping, as in `from_pretrained`. Unlike there, a missing weight and an unknown key are errors by
name: transformers fills the first with random numbers and ignores the second.

A folder quantized by bitsandbytes may have published names too (transformers restores those of GPT-NeoX's head and Gemma 3's layers
when it saves): the parts of a quantized weight follow the weight.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_lite.base.quantization import parts_of
from qlora_lite.base.tensor_files import open_safetensors, weight_files
from qlora_lite.errors import ModelError

# Prefixes of a multimodal checkpoint's language model, as published (Gemma 3) and as written by transformers 5: both become `model.`.
_LANGUAGE_MODEL = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)")
_LANGUAGE_HEAD = re.compile(r"^language_model\.(?=lm_head\.)")
_VISION = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_ROTARY = re.compile(r"rotary_emb\.inv_freq$")  # computed from the config
_NUM_NAMED = 5


class LazyTensor:
    """One tensor of a safetensors file, read on demand."""

    def __init__(self, file: Any, key: str) -> None:
        self._file, self.key = file, key

    def shape(self) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self.key).get_shape())

    def value(self) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self.key)
        return tensor


@dataclass(frozen=True)
class PublishedWeights:
    """`tensors` by module name: exactly the weights that the model needs. `is_tied`: whether its head is its embedding.

    In a quantized folder also the parts of each quantized weight, with bitsandbytes' suffixes.
    """

    tensors: dict[str, LazyTensor]
    num_vision: int  # tensors of a vision tower, left out
    is_tied: bool


def published_weights(folder: Path, model: PreTrainedModel) -> PublishedWeights:
    """Find the weights of `model` (see skeleton.py) in the safetensors of `folder`; reads only the heads of the files.

    Raises ModelError with every missing weight, every wrong shape and every key without a place in the model.
    """
    stored, num_vision = _without_vision(dict(open_tensors(folder)))
    return _fitting(folder, model, stored, num_vision, packed=())


def quantized_weights(folder: Path, model: PreTrainedModel) -> PublishedWeights:
    """The same for a folder quantized by bitsandbytes. Does not check the shapes of quantized weights, which are packed."""
    stored, num_vision = _without_vision(dict(open_tensors(folder)))
    parts = parts_of(stored)
    part_keys = {part for parts_of_weight in parts.values() for part in parts_of_weight}
    whole = {key: tensor for key, tensor in stored.items() if key not in part_keys}
    weights = _fitting(folder, model, whole, num_vision, packed=parts)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in weights.tensors.items():
        module, module_key = name.removesuffix(".weight"), tensor.key.removesuffix(".weight")
        tensors[name] = tensor
        tensors |= {module + part.removeprefix(module_key): stored[part] for part in parts.get(tensor.key, ())}
    return replace(weights, tensors=tensors)


def _without_vision(stored: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], int]:
    """-> (the tensors of the language model, the number of vision tensors)."""
    vision = {key for key in stored if _VISION.match(key)} if any(map(_LANGUAGE_MODEL.match, stored)) else set()
    return {key: tensor for key, tensor in stored.items() if key not in vision}, len(vision)


def _fitting(
    folder: Path, model: PreTrainedModel, stored: dict[str, LazyTensor], num_vision: int, *, packed: Collection[str]
) -> PublishedWeights:
    """Match `stored` to module names. `packed`: keys whose shape is not checked. Raises ModelError as `published_weights` does."""
    named, unknown = _by_module(model, stored)
    is_tied = _settle_tied(model, named)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = own.keys() - (model.all_tied_weights_keys if is_tied else {})
    problems = [f"{name}: not in the files" for name in sorted(needed - named.keys())]
    problems += [
        f"{name}: has shape {list(named[name].shape())}, config.json says {list(own[name])}"
        for name in sorted(needed & named.keys())
        if named[name].key not in packed and named[name].shape() != own[name]
    ]
    problems += [f"{key}: has no place in a {model.config.model_type} model" for key in sorted(unknown)]
    if problems:
        more = [f"  ... and {len(problems) - _NUM_NAMED} more"] if len(problems) > _NUM_NAMED else []
        lines = [f"  {problem}" for problem in problems[:_NUM_NAMED]]
        raise ModelError("\n".join([f"{folder}: the safetensors do not match config.json", *lines, *more]))
    return PublishedWeights({name: named[name] for name in own if name in needed}, num_vision, is_tied)


def open_tensors(folder: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Yield (key, lazy tensor) for every tensor in the folder's safetensors. Raises ModelError for missing or damaged files."""
    for path in weight_files(folder):
        file = open_safetensors(path)
        for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            yield key, LazyTensor(file, key)


def _by_module(model: PreTrainedModel, stored: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """-> (tensors by module name, keys without a place)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    own = model.state_dict()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()] + [_ROTARY]
    named: dict[str, LazyTensor] = {}
    unknown: list[str] = []
    for key, tensor in stored.items():
        plain = _LANGUAGE_HEAD.sub("", _LANGUAGE_MODEL.sub("model.", key))
        name, converted = rename_source_key(plain, renamings, converters, model.base_model_prefix, own)
        if converted is not None:
            raise ModelError(
                f"{key}: transformers rearranges this weight while loading, which is not supported. "
                "Load the model with transformers, save it, and use that folder"
            )
        if name in own and name not in named:
            named[name] = tensor
        elif not any(pattern.search(name) for pattern in ignored):
            unknown.append(key)
    return named, unknown


def _settle_tied(model: PreTrainedModel, named: dict[str, LazyTensor]) -> bool:
    """Whether tied weights are one weight in these files too; if so, `named` keeps only the source weight.

    Files may contain both (OPT), only the other one, or two different ones although the config ties them: then they are untied.
    """
    for target, source in model.all_tied_weights_keys.items():
        if target in named and source in named and not torch.equal(named[target].value(), named[source].value()):
            return False
        if target in named:
            tensor = named.pop(target)
            named.setdefault(source, tensor)
    return bool(model.all_tied_weights_keys)
