"""Load the frozen base from its artefact: transformers' model with bitsandbytes' 4-bit layers, and its tokenizer."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora_lite.errors import ModelError
from qlora_lite.model.attention import PACKED
from qlora_lite.model.bnb import bitsandbytes, keep_weights_unpacked


@dataclass(frozen=True)
class LoadedBase:
    """A frozen 4-bit model on its device, in eval mode, and what it needs to read and write text."""

    model: PreTrainedModel
    tokenizer: Any
    weights_bytes: int  # all parameters and buffers as they lie in memory, quantization constants apart
    quant_constants_bytes: int


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises ModelError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: no readable tokenizer ({type(error).__name__}: {error})") from error


def load_base(artefact: Path, *, device: str, compute: torch.dtype = torch.bfloat16) -> LoadedBase:
    """The frozen model of `artefact` (see artefact.py), its 4-bit weights dequantized to `compute` whenever they are used.

    Raises ModelError when the folder does not load.
    """
    with _quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(artefact),
                dtype=compute,
                device_map={"": device},
                attn_implementation=PACKED,
                local_files_only=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{artefact}: does not load as a 4-bit model ({type(error).__name__}: {error})") from error
    keep_weights_unpacked(model)
    _set_compute_type(model, compute, device)
    model.requires_grad_(False).eval()
    weights, constants = _resident_bytes(model)
    return LoadedBase(model, load_tokenizer(artefact), weights, constants)


def load_merged(folder: Path, *, device: str, compute: torch.dtype = torch.bfloat16) -> LoadedBase:
    """An ordinary 16-bit checkpoint, such as `merge` writes, whole in memory. Raises ModelError when it does not load."""
    with _quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=compute, device_map={"": device}, attn_implementation=PACKED, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: does not load ({type(error).__name__}: {error})") from error
    model.requires_grad_(False).eval()
    weights, constants = _resident_bytes(model)
    return LoadedBase(model, load_tokenizer(folder), weights, constants)


def checkpoint_activations(model: PreTrainedModel, *, enable: bool) -> None:
    """Keep one hidden state a layer and compute the rest again in the backward pass (arXiv 1604.06174), or stop doing so."""
    model._set_gradient_checkpointing(
        enable=enable, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
    )


def _set_compute_type(model: PreTrainedModel, compute: torch.dtype, device: str) -> None:
    """Compute in `compute` throughout: transformers leaves the weights beside the 4-bit ones in the type they are stored in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # embeddings, norms, head; packed weights are uint8
            parameter.data = parameter.data.to(compute)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = compute, True
            if device == "cpu" and module.in_features % 64 == 32:
                # bitsandbytes 0.50's AVX512 kernel takes the wrong absmax there; can go when upstream reads it right
                raise ModelError(
                    f"{name}: bitsandbytes computes 4-bit layers of width {module.in_features} (32 more than a multiple of 64) "
                    "wrongly on the CPU. Use device: cuda for this model"
                )


def _resident_bytes(model: PreTrainedModel) -> tuple[int, int]:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    constants = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            constants += sum(part.nbytes for part in parts)
    return sum(tensor.nbytes for tensor in tensors.values()), constants


class _quiet_transformers:
    """No progress bar and no advice from transformers inside this block; ours are on the screen already."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bar:
            transformers_logging.enable_progress_bar()
