"""All state of a run that changes during training, in one object: the content of a checkpoint, and the starting point of a retry.

trained      the adapter's parameters, or every weight (saved as model/trained.py has it)
optimizer    its state tensors and step counts
random       torch's generators (dropout); the order of the data is a function of seed and step
loss scale   of fp16 training
step         optimizer steps done; with the seed it also fixes the data position and the learning rate
best         the lowest validation loss so far, and the step it was measured after
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_lite.device.accelerator import random_state, set_random_state
from qlora_lite.errors import RunError
from qlora_lite.files.json_text import parse_json
from qlora_lite.foreign import foreign
from qlora_lite.model.trained import load_trained, save_trained, trained_parameters
from qlora_lite.training.best import Best
from qlora_lite.training.footprint import Footprint
from qlora_lite.training.optimizer import STATE_TENSORS

_TENSORS, _FACTS = "state.safetensors", "state.json"
_ACCELERATORS = "random/cuda"  # present with a card: checkpoints move between machines with and without one


@dataclass(frozen=True)
class Snapshot:
    """A copy of a TrainState at one moment."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


@dataclass
class TrainState:
    """The changing parts of a run. `snapshot` and `restore` stay in memory, `save` and `load` go through files."""

    model: PeftModel | PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    first_loss: float | None = None  # the reference of divergence
    history: list[float] = field(default_factory=list)  # losses of the last steps, newest last
    best: Best | None = None  # None before the first evaluation
    footprint: Footprint | None = None  # memory settings of the current steps; None before the first

    def is_over(self, num_steps: int, *, early_stop: int | None = None) -> bool:
        """Whether all steps are done, or the validation loss has not fallen for `early_stop` evaluations (None: ignored)."""
        has_stalled = early_stop is not None and self.best is not None and self.best.num_since >= early_stop
        return self.step >= num_steps or has_stalled

    def snapshot(self) -> Snapshot:
        """Return a copy that later steps do not change."""
        return Snapshot({name: tensor.detach().clone() for name, tensor in self._tensors().items()}, self._facts())

    def random_numbers(self) -> Snapshot:
        """Return the part of a snapshot that forward and backward change: cheap enough for every step."""
        tensors = {"random/cpu": torch.get_rng_state()}
        of_accelerator = random_state()
        if of_accelerator is not None:
            tensors[_ACCELERATORS] = of_accelerator
        return Snapshot(tensors, {})

    def restore_random_numbers(self, snapshot: Snapshot) -> None:
        """Restore the generators of `snapshot`; an accelerator's generator only if both machines have one."""
        torch.set_rng_state(snapshot.tensors["random/cpu"])
        if _ACCELERATORS in snapshot.tensors and random_state() is not None:
            set_random_state(snapshot.tensors[_ACCELERATORS])

    def restore(self, snapshot: Snapshot) -> None:
        """Restore `snapshot`, in place. Raises ValueError if it belongs to another run."""
        tensors = self._tensors()
        differing = {name for name in tensors.keys() ^ snapshot.tensors.keys() if name != _ACCELERATORS}
        if differing:
            raise ValueError(f"state of another run: {sorted(differing)[:3]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not name.startswith("random/"):
                    tensor.copy_(snapshot.tensors[name])
        self._set_facts(snapshot.facts)
        self.restore_random_numbers(snapshot)

    def num_bytes(self) -> int:
        """Return the bytes of all tensors that `save` writes."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def save(self, folder: Path, *, base: Path) -> None:
        """Write adapter/ or weights/, state.safetensors and state.json into `folder`; `base` is the base model's folder."""
        save_trained(self.model, folder, base=base)
        tensors = {k: v.detach().contiguous() for k, v in self._tensors().items() if not k.startswith("trained/")}
        save_file(tensors, folder / _TENSORS)
        (folder / _FACTS).write_text(json.dumps(self._facts(), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the files of `save`. Raises RunError if they are damaged or belong to another run."""
        with foreign(lambda reason: RunError(f"{folder}: not a checkpoint of this run ({reason})")):
            trained = load_trained(self.model, folder)
            tensors = load_file(folder / _TENSORS)
            facts = parse_json((folder / _FACTS).read_bytes())
            tensors |= {f"trained/{name}": tensor for name, tensor in trained.items()}
            self.restore(Snapshot(tensors, facts))

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = dict(self.random_numbers().tensors)
        for name, parameter in trained_parameters(self.model).items():
            tensors[f"trained/{name}"] = parameter
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer/{name}/{key}": state[key] for key in STATE_TENSORS if key in state}
        return tensors

    def _facts(self) -> dict[str, Any]:
        counts = [state["step"] for state in self.optimizer.state.values()]
        return {
            "schema_version": 1,
            "step": self.step,
            "optimizer_steps": counts,
            "loss_scale": self.scaler.state_dict(),
            "first_loss": self.first_loss,
            "history": self.history,
            "best": None if self.best is None else asdict(self.best),
            "footprint": None if self.footprint is None else self.footprint.to_json_dict(),
        }

    def _set_facts(self, facts: dict[str, Any]) -> None:
        self.step, self.first_loss, self.history = facts["step"], facts["first_loss"], list(facts["history"])
        self.best = None if facts["best"] is None else Best(**facts["best"])
        self.footprint = None if facts["footprint"] is None else Footprint.from_json(facts["footprint"])
        for state, count in zip(self.optimizer.state.values(), facts["optimizer_steps"], strict=True):
            state["step"] = count
        if facts["loss_scale"]:
            self.scaler.load_state_dict(facts["loss_scale"])
