"""How a step is computed, of all ways that give the same result: what a plan chooses, and what running out of memory changes."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import CHUNK
from qlora_lite.model.load import checkpoint_activations


@dataclass(frozen=True)
class Footprint:
    """Changes memory and speed; the gradient only in its rounding, and without another split into micro-batches not at all."""

    micro_batch_tokens: int
    checkpoint_every: int = (
        1  # activations of every so many-th layer are computed again in the backward pass; 0: of none
    )
    head_chunk: int = CHUNK  # label positions projected at once

    def __str__(self) -> str:
        layers = {0: "no layer", 1: "every layer"}.get(self.checkpoint_every, f"one layer in {self.checkpoint_every}")
        return f"{self.micro_batch_tokens} tokens a micro-batch, {layers} checkpointed, {self.head_chunk} labels a head chunk"


def apply_footprint(model: PeftModel | PreTrainedModel, footprint: Footprint) -> None:
    """What of it is a property of the model: which layers are checkpointed."""
    checkpoint_activations(causal_lm(model), every=footprint.checkpoint_every)
