"""A model without memory: all its modules and buffers, every weight on the meta device. What shapes and names are read from."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_lite.errors import ModelError
from qlora_lite.foreign import foreign


def empty_model(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """The causal language model that `config` describes, its parameters on meta, its buffers (rotary frequencies) real.

    `settings` go to transformers (`dtype`, `attn_implementation`). Raises ModelError for a config that describes no model.

    No embedding keeps a `padding_idx`: nothing is padded here, and torch would leave the gradient of that token's row at zero, though
    the padding token is often the stop token. It would also refuse an embedding that holds only the rows at hand (merging/streamed.py).
    """
    name = config.name_or_path or config.model_type
    with foreign(lambda said: ModelError(f"{name}: config.json: describes no usable model ({said})")):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, **settings)
        model.tie_weights()  # accelerate has put every weight on meta by itself
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of the causal language model that `config` describes."""
    kind: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind
