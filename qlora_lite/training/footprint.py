"""Memory settings of a step that do not change its result: chosen by the plan, made leaner when memory runs out."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import CHUNK
from qlora_lite.model.load import checkpoint_activations


@dataclass(frozen=True)
class Footprint:
    """Changes memory and speed. The gradient changes in its rounding only, and only with another split into micro-batches."""

    micro_batch_tokens: int
    checkpoint_every: int = 1  # n: activations of every n-th layer are recomputed in the backward pass; 0: of none
    head_chunk: int = CHUNK  # label positions projected at a time

    def __str__(self) -> str:
        layers = {0: "no layer", 1: "every layer"}.get(self.checkpoint_every, f"one layer in {self.checkpoint_every}")
        return f"{self.micro_batch_tokens} tokens per micro-batch, {layers} checkpointed, {self.head_chunk} labels per head chunk"


def apply_footprint(model: PeftModel | PreTrainedModel, footprint: Footprint) -> None:
    """Set which layers of the model are checkpointed; the other settings belong to the step."""
    checkpoint_activations(causal_lm(model), every=footprint.checkpoint_every)
