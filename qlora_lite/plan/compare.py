"""One training by three methods: QLoRA, 16-bit LoRA and full fine-tuning, with their memory and their sizes on disk.

`full` is `method: full`: bf16 weights, the lower half of an fp32 master, fp32 gradients, AdamW; `full_8bit` is the same with 8-bit
AdamW states.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from qlora_lite.model.policy import PLAIN
from qlora_lite.plan.rehearsal import Body, MicroBatch, Rehearsal, Settings, Stage, of_body
from qlora_lite.plan.scoring import Scoring, rehearse_evaluation, with_evaluation

METHODS = ("qlora", "lora", "full", "full_8bit")
RANKS = (1, 8, 64)  # ranks whose adapter sizes are listed beside a whole checkpoint
_FULL_OPTIMIZER = {"full": "adamw", "full_8bit": "paged_adamw_8bit"}
_STATE_BYTES = {"adamw": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}  # per trained weight


_known: dict[tuple[str, Settings, MicroBatch], Rehearsal] = {}  # a rehearsal depends only on these
_known_shallow: dict[tuple[str, Settings, MicroBatch], Rehearsal] = {}
_known_evaluations: dict[tuple[str, Settings, Scoring], dict[str, int]] = {}  # also only on these


class Rehearsals:
    """The rehearsals of one model, with any settings; each is computed once."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._key = config.to_json_string(use_diff=False)
        self._stage = cache(partial(Stage, config, bodies=self._body))
        self._bodies: dict[tuple[int, Settings], Body] = {}

    def of(self, settings: Settings, batch: MicroBatch, scoring: Scoring | None = None) -> Rehearsal:
        """See `Stage.rehearse`; with `scoring`, evaluation is one of its phases. Raises ModelError for an invalid config."""
        key = self._key, settings, batch
        if key not in _known:
            _known[key] = self._stage(settings).rehearse(batch)
        return _known[key] if scoring is None else with_evaluation(_known[key], self.evaluation(settings, scoring))

    def shallow(self, settings: Settings, batch: MicroBatch) -> Rehearsal:
        """See `Stage.rehearse_shallow`."""
        key = self._key, settings, batch
        if key not in _known_shallow:
            _known_shallow[key] = self._stage(settings).rehearse_shallow(batch)
        return _known_shallow[key]

    def _body(self, config: PreTrainedConfig, settings: Settings) -> Body:
        """Return the model shared by all settings that only change a step."""
        key = config.num_hidden_layers, of_body(settings)
        if key not in self._bodies:
            self._bodies[key] = Body(config, settings)
        return self._bodies[key]

    def evaluation(self, settings: Settings, scoring: Scoring) -> dict[str, int]:
        """Return bytes by part at the peak of an evaluation, which is independent of the training batch."""
        key = self._key, settings, scoring
        if key not in _known_evaluations:
            _known_evaluations[key] = rehearse_evaluation(self._stage(settings), scoring)
        return _known_evaluations[key]


class Comparison:
    """Rehearsals of every method with the same settings, computed on demand."""

    def __init__(self, rehearsals: Rehearsals, settings: Settings) -> None:
        self.settings = settings
        self._rehearsals = rehearsals

    def rehearse(self, method: str, batch: MicroBatch, scoring: Scoring | None = None) -> Rehearsal:
        """Rehearse one of METHODS; with `scoring`, evaluation is one of its phases."""
        return self._rehearsals.of(as_method(self.settings, method), batch, scoring)

    def rehearse_shallow(self, method: str, batch: MicroBatch) -> Rehearsal:
        """See `Stage.rehearse_shallow`."""
        return self._rehearsals.shallow(as_method(self.settings, method), batch)

    def checkpoint_bytes(self, batch: MicroBatch) -> dict[str, int]:
        """Return bytes on disk of 16-bit weights and of the adapter, each with and without the state for resuming."""
        qlora, full = self.rehearse("qlora", batch), self.rehearse("full", batch)
        state = _STATE_BYTES[self.settings.optimizer] + 2  # and the lower half of the fp32 master
        return {
            "full": 2 * full.num_trained,
            "full_resume": (2 + _STATE_BYTES["adamw"] + 2) * full.num_trained,
            "adapter": self.settings.factors.itemsize * qlora.num_trained,
            "adapter_resume": (self.settings.factors.itemsize + state) * qlora.num_trained,
        }

    def adapter_bytes(self, batch: MicroBatch) -> dict[int, int]:
        """Return bytes on disk of an adapter, by rank: this training's rank and RANKS."""
        qlora, rank = self.rehearse("qlora", batch), self.settings.r
        rest = qlora.num_trained - qlora.num_in_factors
        per_rank = qlora.num_in_factors // rank
        return {r: self.settings.factors.itemsize * (rest + per_rank * r) for r in sorted({rank, *RANKS})}


def as_method(settings: Settings, method: str) -> Settings:
    """Return the same settings for another method. On a card without bf16, trained weights are fp32: fp16 would lose updates."""
    if method in _FULL_OPTIMIZER:
        settings = replace(
            settings,
            method="full",
            optimizer=_FULL_OPTIMIZER[method],
            use_dora=False,
            modules_to_save=(),
            policy=PLAIN,
        )
        is_fp16 = settings.compute is torch.float16
        return replace(settings, compute=torch.float32, factors=torch.float32) if is_fp16 else settings
    return replace(settings, method=method)


def own_method(method: str, optimizer: str) -> str:
    """Return the entry of METHODS that a recipe's method and optimizer run."""
    return "full_8bit" if method == "full" and optimizer == "paged_adamw_8bit" else method


def as_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as an entry of `methods` in the plan's JSON."""
    return {
        "peak_bytes": rehearsal.peak_bytes,
        "host_bytes": rehearsal.host_bytes,
        "host_parts": _in_bytes(rehearsal.host_parts),
        "parts": _in_bytes(rehearsal.parts),
        "phases": {
            phase: {"peak_bytes": sum(parts.values()), "parts": _in_bytes(parts)}
            for phase, parts in rehearsal.phases.items()
        },
    }


def _in_bytes(parts: dict[str, int]) -> dict[str, int]:
    return {f"{part}_bytes": size for part, size in parts.items()}
