"""Load the frozen base from its folder: transformers' model with bitsandbytes' 4-bit layers, and its tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora_lite.base.bnb import keep_weights_unpacked, quantization_constants
from qlora_lite.base.published import published_weights
from qlora_lite.base.quantization import stored_quantization
from qlora_lite.base.skeleton import empty_model, model_class
from qlora_lite.base.source import load_config, read_config, read_json
from qlora_lite.device.out_of_memory import is_out_of_memory
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import GENERATION_FILE
from qlora_lite.foreign import foreign
from qlora_lite.limits import TOKENIZER_BYTES
from qlora_lite.model.attention import PACKED, packs_rows, padded_attention
from qlora_lite.model.new_tokens import add_tokens, make_room
from qlora_lite.model.policy import PLAIN, Policy
from qlora_lite.model.streaming import Homes
from qlora_lite.model.weights import fill_model, fill_plain

_DROPOUT = (
    *("attention_dropout", "hidden_dropout", "dropout", "activation_dropout", "layerdrop", "classifier_dropout"),
    *("embd_pdrop", "resid_pdrop", "embedding_dropout", "residual_dropout"),
)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen 4-bit model on its device, in eval mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    new_token_ids: list[int]  # the tokens of data.special_tokens, and those between them and the base's last row
    weights_bytes: int  # all parameters and buffers in memory, without quantization constants
    quant_constants_bytes: int


def load_tokenizer(folder: Path, *, special_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer of a model folder, with `special_tokens` added. Raises ModelError when it has none."""
    large = [path for path in folder.glob("*token*") if path.is_file() and path.stat().st_size > TOKENIZER_BYTES]
    if large:
        raise ModelError(f"{large[0]}: larger than {TOKENIZER_BYTES:,} bytes, the limit for a tokenizer file")
    with foreign(lambda said: ModelError(f"{folder}: no readable tokenizer ({said})")):
        # explicitly False: by default transformers asks on the terminal whether to run the folder's code
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        add_tokens(tokenizer, special_tokens)
    return tokenizer


def load_base(
    folder: Path,
    *,
    device: str,
    compute: torch.dtype = torch.bfloat16,
    special_tokens: Sequence[str] = (),
    policy: Policy = PLAIN,
) -> LoadedBase:
    """The frozen model in `folder`: a quantized base (base/artefact.py) or a 16-bit folder, as published or as `merge` writes it.

    Quantized weights are dequantized to `compute` at each use; all others are stored in it. `special_tokens` are added to the tokenizer,
    and missing rows for them to embedding and head. Layers that `policy` streams are never all on the device. Raises ModelError when the
    folder does not load.
    """
    config = load_config(folder)
    switch_off_dropout(config)
    with _quiet_transformers():
        try:
            if stored_quantization(read_config(folder), folder) is not None:
                model = _empty(config, compute)
                fill_model(model, folder, device=device, compute=compute, homes=_homes(model, policy, device))
            else:
                model = _plain_model(config, folder, device=device, compute=compute, policy=policy)
            if (folder / GENERATION_FILE).is_file():
                model.generation_config = _generation_config(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(f"{folder}: does not load ({type(error).__name__}: {error})") from error
    keep_weights_unpacked(model)
    model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(folder, special_tokens=special_tokens)
    new_token_ids = make_room(model, tokenizer.convert_tokens_to_ids(list(special_tokens)))
    weights, constants = _resident_bytes(model)
    return LoadedBase(model, tokenizer, new_token_ids, weights, constants)


def _generation_config(folder: Path) -> GenerationConfig:
    read_json(folder / GENERATION_FILE)
    path, advice = folder / GENERATION_FILE, "Correct or remove it: nothing here needs it"
    with foreign(lambda said: ModelError(f"{path}: not readable as generation settings ({said}). {advice}")):
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def _homes(model: PreTrainedModel, policy: Policy, device: str) -> Homes | None:
    if policy.resident_layers is None:
        return None
    return Homes(model, resident=policy.resident_layers, from_disk=policy.stream_from == "disk", device=device)


def _plain_model(config: Any, folder: Path, *, device: str, compute: torch.dtype, policy: Policy) -> PreTrainedModel:
    model = _empty(config, compute)
    weights = published_weights(folder, model)
    if model.all_tied_weights_keys and not weights.is_tied:  # the files have a separate head, whatever the config says
        config.tie_word_embeddings = False
        model = _empty(config, compute)
    homes = _homes(model, policy, device)
    fill_plain(model, weights.tensors, device=device, compute=compute, where=folder, homes=homes)
    return model


def _empty(config: Any, compute: torch.dtype) -> PreTrainedModel:
    return empty_model(config, dtype=compute, attn_implementation=attention_of(model_class(config)))


def attention_of(kind: type[PreTrainedModel]) -> str:
    """transformers' name of the attention for training."""
    return PACKED if packs_rows(kind) else padded_attention(kind)


def checkpoint_activations(model: PreTrainedModel, *, every: int) -> None:
    """Keep one hidden state of every `every`-th layer, and recompute the rest in the backward pass (arXiv 1604.06174).

    1: every layer; 0: no checkpointing.
    """
    model._set_gradient_checkpointing(
        enable=every > 0,
        gradient_checkpointing_func=partial(checkpoint, use_reentrant=False),
        every_n_layers=every or 1,
    )


def switch_off_dropout(config: Any) -> None:
    """Set all dropout of the base to 0, so that training computes the same as inference; `lora.lora_dropout` is the only dropout.

    Some published configs have dropout (OPT: 0.1 of every layer's output), meant for training from scratch.
    """
    for name in _DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _resident_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """-> (parameters and buffers, quantization constants); shared tensors count once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values()), sum(
        tensor.nbytes for tensor in quantization_constants(model)
    )


class _quiet_transformers:
    """Inside, no progress bar and no advice from transformers: the program has its own."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
        if self._bar:
            transformers_logging.enable_progress_bar()
