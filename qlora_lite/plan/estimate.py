"""Bytes by arithmetic on shapes: QLoRA, LoRA and full fine-tuning of the same model, as this recipe would run them.

n weights in the linear layers, m others (embeddings, head, norms), p in the factors, T tokens in the largest micro-batch,
L layers, D hidden, I intermediate, K key/value width.

    QLoRA   weights n/2 + 2m, constants n/64 + 4n/16384, adapter 2p, optimizer 2p + remainder 2p (8-bit) or 8p + 2p, gradients 4p
    LoRA    the same with 16-bit weights: 2n + 2m and no constants
    full    weights 2 bytes, the rest of the fp32 master 2, AdamW moments 8, fp32 gradients 4: 16 bytes a weight

Activations (all): one hidden state a layer is kept, 2*L*T*D, and one layer is computed again: about 10 D, 4 K and 5 I values a
token in 16 bits and two norms in fp32. An estimate: measured and estimated stand side by side in the run's memory table.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lite.model.head import CHUNK, ROWS
from qlora_lite.model.skeleton import empty_model

METHODS = ("qlora", "lora", "full")
# Bytes a weight of full fine-tuning: bf16, fp32 gradients, the other 16 bits of the fp32 master and two fp32 moments.
_FULL_BYTES = {"weights_bytes": 2, "gradients_bytes": 4, "optimizer_bytes": 10}


@dataclass(frozen=True)
class Estimate:
    """For each method its parts in bytes at the peak; they sum to `peak_bytes`."""

    parts: dict[str, dict[str, int]]
    num_weights: int
    num_adapter_weights: int

    def peak_bytes(self, method: str) -> int:
        """`qlora`, `lora` or `full`."""
        return sum(self.parts[method].values())


def estimate_memory(
    config: Any,
    *,
    r: int,
    target_modules: str | tuple[str, ...],
    optimizer: str,
    micro_batch_tokens: int,
    label_share: float,
    checkpointing: bool,
    factor_bytes: int,
    quantization: str = "nf4",
    double_quant: bool = True,
) -> Estimate:
    """`config` is a transformers config: the model is built on the meta device, nothing is loaded.

    `label_share` is the share of tokens that carry a label.
    """
    model = empty_model(config)
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    quantized = [module.weight.numel() for module in linear.values()]
    all_weights = sum(parameter.numel() for parameter in model.parameters())
    targets = [module for name, module in linear.items() if _is_target(name, target_modules)]
    factors = sum(r * (module.in_features + module.out_features) for module in targets)
    intermediate = max(module.in_features for module in linear.values())
    activations, recompute = _activation_bytes(config, micro_batch_tokens, intermediate, checkpointing=checkpointing)
    label_tokens = min(CHUNK, ROWS * math.ceil(label_share * micro_batch_tokens / ROWS))
    logits = 3 * 4 * label_tokens * config.vocab_size  # logits, log-softmax and their gradient, in fp32
    # The head is done before the first layer is computed again, so only the larger of the two counts at the peak.
    shared = {
        "activations_bytes": activations,
        "recompute_bytes": recompute if recompute >= logits else 0,
        "logits_bytes": logits if logits > recompute else 0,
    }
    adapter = {
        "adapter_bytes": factor_bytes * factors,
        "gradients_bytes": 4 * factors,
        "optimizer_bytes": (2 if optimizer == "paged_adamw_8bit" else 8) * factors
        + (2 * factors if factor_bytes == 2 else 0),
        **shared,
    }
    num_quantized = sum(quantized)
    weights, constants = _quantized_bytes(quantized, quantization=quantization, double_quant=double_quant)
    others = 2 * (all_weights - num_quantized)
    parts = {
        "qlora": {"weights_bytes": weights + others, "quant_constants_bytes": constants, **adapter},
        "lora": {"weights_bytes": 2 * all_weights, **adapter},
        "full": {part: each * all_weights for part, each in _FULL_BYTES.items()} | shared,
    }
    return Estimate(parts, num_weights=all_weights, num_adapter_weights=factors)


def _quantized_bytes(sizes: list[int], *, quantization: str, double_quant: bool) -> tuple[int, int]:
    """(packed weights, constants) of linear layers with so many weights each."""
    if quantization == "int8":
        return sum(sizes), 0  # one fp32 scale a row: thousandths
    per_block = [_constants_bytes(n) if double_quant else 4 * math.ceil(n / 64) + 4 * 16 for n in sizes]
    return sum(math.ceil(n / 2) for n in sizes), sum(per_block)


def _constants_bytes(num_weights: int) -> int:
    """absmax (uint8 a block of 64), nested absmax (fp32 a block of 256), two code books and the offset."""
    blocks = math.ceil(num_weights / 64)
    return blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256) + 4


def _is_target(name: str, target_modules: str | tuple[str, ...]) -> bool:
    return target_modules == "all-linear" or any(name == t or name.endswith("." + t) for t in target_modules)


def _activation_bytes(config: Any, tokens: int, intermediate: int, *, checkpointing: bool) -> tuple[int, int]:
    """(kept for the backward pass, computed again at a time). `intermediate` is the MLP's width."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    key_value = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    layer = tokens * (2 * (10 * hidden + 4 * key_value + 5 * intermediate) + 2 * 4 * hidden)
    return (2 * layers * tokens * hidden, layer) if checkpointing else (layers * layer, 0)
