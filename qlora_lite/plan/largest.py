"""The largest known model that a method can train in a budget on one short example: from the built-in table, by number of weights."""

from dataclasses import replace

from transformers import PreTrainedConfig

from qlora_lite.base.known import known_config
from qlora_lite.base.known_shapes import SHAPES
from qlora_lite.plan.compare import Comparison, Rehearsals
from qlora_lite.plan.rehearsal import MicroBatch, Settings

LENGTH = 512  # tokens of the example
# Minimum bytes per weight of a layer: 4 bits and an 8-bit scale per block; 16 bits; 16 bits with fp32 gradient, lower half of the
# master and two moments. Embeddings always have at least 16 bits.
_LEAST_BYTES = {"qlora": 0.5 + 1 / 64, "lora": 2.0, "full": 16.0, "full_8bit": 10.0}


def largest_model(method: str, settings: Settings, *, budget_bytes: int, label_share: float) -> str | None:
    """Return its short name, None if the smallest does not fit. `method` is one of METHODS; clearly too large models are not rehearsed."""
    batch = MicroBatch(LENGTH, 1, label_share)
    settings = replace(
        settings, target_modules="all-linear", modules_to_save=(), token_ids=()
    )  # names differ from model to model
    for name in sorted(SHAPES, key=lambda name: SHAPES[name].num_weights, reverse=True):
        config = known_config(name)
        if _least_bytes(config, SHAPES[name].num_weights, method) > budget_bytes:
            continue
        if Comparison(Rehearsals(config), settings).rehearse(method, batch).peak_bytes <= budget_bytes:
            return name
    return None


def _least_bytes(config: PreTrainedConfig, num_weights: int, method: str) -> float:
    in_embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return _LEAST_BYTES[method] * (num_weights - in_embeddings) + max(2.0, _LEAST_BYTES[method]) * in_embeddings
