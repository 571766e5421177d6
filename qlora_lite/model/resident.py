"""The tensors in memory before the first step, by part."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.base.bnb import quantization_constants


def residents(model: PreTrainedModel | PeftModel) -> dict[str, list[torch.Tensor]]:
    """The tensors of `weights` (frozen ones, or all with method full; and buffers), `adapter` and `quant_constants`."""
    is_full = not isinstance(model, PeftModel)
    parameters = list(model.parameters())
    return {
        "weights": [*(p for p in parameters if is_full or not p.requires_grad), *model.buffers()],
        "adapter": [] if is_full else [p for p in parameters if p.requires_grad],
        "quant_constants": list(quantization_constants(model)),
    }
