"""Memory settings of a step that do not change its result: chosen by the plan, made leaner when memory runs out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import CHUNK
from qlora_lite.model.load import checkpoint_activations
from qlora_lite.model.policy import PLAIN, Policy
from qlora_lite.model.residency import apply_policy


@dataclass(frozen=True)
class Footprint:
    """Changes memory and speed. The gradient changes in its rounding only: with another split into micro-batches, or other chunks."""

    micro_batch_tokens: int
    checkpoint_every: int = 1  # n: activations of every n-th layer are recomputed in the backward pass; 0: of none
    head_chunk: int = CHUNK  # label positions projected at a time
    policy: Policy = PLAIN  # where parts of the model wait, and the chunks of a layer; not plain: checkpoint_every is 1

    def __str__(self) -> str:
        layers = {0: "no layer", 1: "every layer"}.get(self.checkpoint_every, f"one layer in {self.checkpoint_every}")
        rest = "" if self.policy.is_plain else f", {self.policy}"
        return f"{self.micro_batch_tokens} tokens per micro-batch, {layers} checkpointed, {self.head_chunk} labels per head chunk{rest}"

    def with_homes_of(self, other: "Footprint") -> "Footprint":
        """Return the footprint with the homes of `other`, which change no bit, unless its chunks differ: they change last bits."""
        is_same_chunk = self.policy.chunk_tokens == other.policy.chunk_tokens
        is_checkpointed = self.checkpoint_every == other.checkpoint_every == 1
        return replace(self, policy=other.policy) if is_same_chunk and is_checkpointed else self

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Footprint":
        """The footprint of a checkpoint; those of earlier versions have no policy. Raises TypeError for other keys."""
        policy = document.get("policy")
        return Footprint(**{**document, "policy": PLAIN if policy is None else Policy(**policy)})


def apply_footprint(model: PeftModel | PreTrainedModel, footprint: Footprint) -> None:
    """Set how the model's layers run: which are checkpointed, and where parts wait; the other settings belong to the step."""
    base = causal_lm(model)
    apply_policy(base, footprint.policy)
    if footprint.policy.is_plain:
        checkpoint_activations(base, every=footprint.checkpoint_every)
