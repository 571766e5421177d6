"""What only a CUDA card can show. Skipped without one; `tools/gpu_check` runs these alone."""

import pytest
import torch

from qlora_lite.data.batches import StepSampler
from qlora_lite.device.accelerator import card_at
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.dtypes import choose_types
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.load import checkpoint_activations, load_base
from qlora_lite.training import Footprint, TrainSettings, TrainState, make_optimizer, train_steps
from tests import tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw"])
def test_twenty_steps_on_the_card_lower_the_loss_and_measure_the_allocator(optimizer: str) -> None:
    types = choose_types("auto", card_at("cuda"))
    base = load_base(tiny_model.tiny_artefact(), device="cuda", compute=types.compute)
    model = attach_adapter(base.model, Lora(r=8, lora_alpha=16), factor_dtype=types.factors)
    checkpoint_activations(causal_lm(model), every=1)
    rows = tiny_model.random_rows([3] * 8)
    state = TrainState(
        model,
        make_optimizer(model.named_parameters(), name=optimizer, learning_rate=5e-3, weight_decay=0.0),
        torch.amp.GradScaler("cuda", enabled=types.scale_loss),
        footprint=Footprint(64, 0),
    )
    steps = list(
        train_steps(
            state,
            rows,
            StepSampler(8, examples_per_step=8, epochs=1, max_steps=20, seed=0),
            TrainSettings("cuda", 5e-3, "constant", 0.0, 1.0),
        )
    )
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert all(step.peak_bytes > 0 for step in steps)


def test_the_gradient_on_the_card_is_the_one_of_the_cpu_within_bf16() -> None:
    rows = tiny_model.random_rows([3] * 4)
    gradients = {}
    for device in ("cpu", "cuda"):
        base = load_base(tiny_model.tiny_artefact(), device=device, compute=torch.float32)
        model = attach_adapter(base.model, Lora(r=4, lora_alpha=8), factor_dtype=torch.float32)
        tiny_model.move_factors(model)
        batches = [batch.to(device) for batch in tiny_model.split_batches(rows, 1)]
        gradients[device] = {name: value.cpu() for name, value in tiny_model.gradients(model, batches).items()}
    assert tiny_model.relative_difference(gradients["cuda"], gradients["cpu"]) < 1e-2
