"""A run taken back to a snapshot, or to a saved state in a fresh process's objects, goes on bit for bit as it did."""

import json

import pytest
import torch

from qlora_lite.data.batches import StepSampler
from qlora_lite.errors import RunError
from qlora_lite.training.best import Best
from qlora_lite.training.footprint import Footprint
from qlora_lite.training.loop import TrainSettings, train_steps
from qlora_lite.training.optimizer import OPTIMIZERS, make_optimizer
from qlora_lite.training.state import TrainState
from tests.tiny_model import random_rows, set_dropout, tiny_adapted

ROWS = random_rows([3, 5, 1, 9, 2, 7, 4, 4])


def fresh_state(name="adamw", *, r=4, dropout=0.1, ratio=1.0, **model) -> TrainState:
    model = tiny_adapted(r=r, **model)
    set_dropout(model, dropout)
    optimizer = make_optimizer(
        model.named_parameters(), name=name, learning_rate=1e-3, weight_decay=0.01, loraplus_ratio=ratio
    )
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def advance(state: TrainState, num_steps: int) -> list[float]:
    sampler = StepSampler(len(ROWS), examples_per_step=4, epochs=1, max_steps=20, seed=0)
    state.footprint = state.footprint or Footprint(48, 0)
    steps = train_steps(state, ROWS, sampler, TrainSettings("cpu", 1e-3, "cosine", 0.1, 1.0))
    return [next(steps).loss for _ in range(num_steps)]


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    return state.snapshot().tensors


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_back_to_a_snapshot_and_on_again_is_the_same_run(name):
    state = fresh_state(name, r=64)
    advance(state, 2)
    snapshot = state.snapshot()
    losses = advance(state, 3)
    end, facts = everything(state), state.snapshot().facts
    advance(state, 1)
    state.restore(snapshot)
    assert state.step == 2 and len(state.history) == 2
    assert_same(everything(state), snapshot.tensors)
    assert advance(state, 3) == losses
    assert_same(everything(state), end)
    assert state.snapshot().facts == facts


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_saved_state_loaded_into_new_objects_goes_on_as_the_same_run(name, ratio, tmp_path):
    state = fresh_state(name, r=64, ratio=ratio)
    advance(state, 2)
    state.save(tmp_path, base=tmp_path)
    losses = advance(state, 3)
    end, facts = everything(state), state.snapshot().facts
    other = fresh_state(name, r=64, ratio=ratio, moved=False)
    torch.manual_seed(99)
    other.load(tmp_path)
    assert other.step == 2
    assert advance(other, 3) == losses
    assert_same(everything(other), end)
    assert other.snapshot().facts == facts


def test_dropout_is_part_of_the_trajectory():
    """Shows that the tests above see the random state: without it the runs would part."""
    state = fresh_state()
    advance(state, 1)
    snapshot = state.snapshot()
    losses = advance(state, 3)
    state.restore(snapshot)
    torch.manual_seed(99)
    assert advance(state, 3) != losses


def test_a_snapshot_is_not_touched_by_later_steps():
    state = fresh_state()
    snapshot = state.snapshot()
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    facts = json.loads(json.dumps(snapshot.facts))
    advance(state, 2)
    assert_same(snapshot.tensors, before)
    assert snapshot.facts == facts
    assert not torch.equal(everything(state)["random/cpu"], before["random/cpu"])


def test_the_loss_scale_comes_back(tmp_path):
    state = fresh_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state.save(tmp_path, base=tmp_path)
    other = fresh_state()
    other.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other.load(tmp_path)
    assert other.scaler.state_dict()["scale"] == 1024.0


@pytest.mark.parametrize("best", [None, Best(40, 0.5, num_since=2)])
def test_the_best_evaluation_comes_back(best, tmp_path):
    state, other = fresh_state(), fresh_state()
    state.best, other.best = best, Best(1, 9.0)
    state.save(tmp_path, base=tmp_path)
    other.load(tmp_path)
    assert other.best == best


def damage_facts(folder):
    (folder / "state.json").write_text("{}")


def damage_tensors(folder):
    (folder / "state.safetensors").write_bytes(b"garbage")


def remove_adapter(folder):
    (folder / "adapter" / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_facts, damage_tensors, remove_adapter])
def test_a_damaged_saved_state_is_refused(damage, tmp_path):
    state = fresh_state()
    state.save(tmp_path, base=tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match="not a checkpoint of this run"):
        state.load(tmp_path)


@pytest.mark.parametrize("other", [{"r": 8}, {"name": "paged_adamw_8bit", "r": 64}])
def test_the_state_of_another_run_is_refused_and_changes_nothing(other, tmp_path):
    fresh_state(**other).save(tmp_path, base=tmp_path)
    state = fresh_state(r=64 if other["r"] == 64 else 4)
    before = everything(state)
    with pytest.raises(RunError, match="not a checkpoint of this run"):
        state.load(tmp_path)
    assert_same(everything(state), before)
