"""The largest well-known model that a method could train in a budget: of the built-in table, by number of weights, one short example."""

from dataclasses import replace

from qlora_lite.model.known import known_config
from qlora_lite.model.known_shapes import SHAPES
from qlora_lite.plan.compare import Comparison, Rehearsals
from qlora_lite.plan.rehearsal import MicroBatch, Settings

LENGTH = 512  # tokens of the example
# Bytes that a weight takes at least: 4 bits; 16 bits; 16 bits with fp32 gradient, lower half of the master and two moments.
_LEAST_BYTES = {"qlora": 0.5, "lora": 2.0, "full": 16.0, "full_8bit": 10.0}


def largest_model(method: str, settings: Settings, *, budget_bytes: int, label_share: float) -> str | None:
    """Its short name, or None where not even the smallest fits. `method` is one of METHODS; what cannot fit is not rehearsed."""
    batch = MicroBatch(LENGTH, 1, label_share)
    settings = replace(settings, target_modules="all-linear", modules_to_save=())  # names differ from model to model
    for name in sorted(SHAPES, key=lambda name: SHAPES[name].num_weights, reverse=True):
        if SHAPES[name].num_weights * _LEAST_BYTES[method] > budget_bytes:
            continue
        if Comparison(Rehearsals(known_config(name)), settings).rehearse(method, batch).peak_bytes <= budget_bytes:
            return name
    return None
