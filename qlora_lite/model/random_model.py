"""A model of any shape with random values, made without files.

For measuring the bytes and seconds of a shape, not for answers. In memory it equals the result of `load_base`, tensor by tensor
(tests/model/test_random_model.py).
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lite.base.artefact import linear_weights
from qlora_lite.base.bnb import keep_weights_unpacked
from qlora_lite.base.quantization import Quantization
from qlora_lite.base.skeleton import empty_model, model_class
from qlora_lite.model.load import attention_of, switch_off_dropout
from qlora_lite.model.weights import fill_plain, fill_quantized

_STD = 0.02  # of matrices: the usual initialization, so that losses and gradients are finite


def random_model(
    config: PreTrainedConfig,
    *,
    quantization: Quantization | None,
    device: str,
    compute: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """The frozen model of `config`, in eval mode. `quantization` None: all weights in `compute`.

    Switches dropout off in `config` itself. Creates the weights on the device one by one. Raises ModelError for an unusable config.
    """
    switch_off_dropout(config)
    model = empty_model(config, dtype=compute, attn_implementation=attention_of(model_class(config)))
    quantized = linear_weights(model) if quantization is not None else frozenset()
    made = {name: _Random(tuple(p.shape), device, compute) for name, p in model.named_parameters()}
    fill_plain(model, {n: made[n] for n in made if n not in quantized}, device=device, compute=compute)
    if quantization is not None:
        weights = ((name, quantization.quantize(name, made[name].value())) for name in sorted(quantized))
        fill_quantized(model, weights, device=device, compute=compute)
    keep_weights_unpacked(model)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Random:
    """A tensor of normal values, or a vector of ones (right for norms, harmless for biases)."""

    shape: tuple[int, ...]
    device: str
    dtype: torch.dtype

    def value(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(std=_STD) if len(self.shape) > 1 else tensor.fill_(1.0)
