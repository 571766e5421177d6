"""A model without weights in memory: all modules and buffers, every weight on the meta device. Gives names and shapes."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.foreign import foreign


def empty_model(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """Build the causal language model of `config`, with parameters on meta and real buffers (rotary frequencies).

    `settings` go to transformers (`dtype`, `attn_implementation`). Raises ModelError for an invalid config.

    Clears every `padding_idx`: nothing is padded here, and torch would keep the gradient of that token's embedding row at zero,
    although the padding token is often the stop token. torch would also refuse an embedding with only some rows (merging/streamed.py).
    """
    name = config.name_or_path or config.model_type
    with foreign(lambda reason: ModelError(f"{name}: config.json: does not describe a usable model ({reason})")):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, **settings)
        model.tie_weights()  # accelerate put every weight on meta separately
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' class for the causal language model of `config`."""
    kind: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind
