"""The tensors in memory before the first step, by part."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.base.bnb import quantization_constants
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.residency import residency_of


def residents(model: PreTrainedModel | PeftModel) -> dict[str, list[torch.Tensor]]:
    """The tensors of `weights` (frozen ones, or all with method full; and buffers), `adapter`, `quant_constants`, and on the host.

    Where frozen tensors wait on the host, `weights` has the buffers on the device that they are streamed through.
    """
    is_full, residency = not isinstance(model, PeftModel), residency_of(causal_lm(model))
    parameters = list(model.parameters())
    weights = [*(p for p in parameters if is_full or not p.requires_grad), *model.buffers()]
    tensors = {
        "weights": weights if residency is None else [*weights, *residency.buffers()],
        "adapter": [] if is_full else [p for p in parameters if p.requires_grad],
        "quant_constants": list(quantization_constants(model)),
    }
    return tensors if residency is None else tensors | residency.away()
