"""Out of memory: before the first step, in any micro-batch of any step, and inside the update. On the CPU the fault is injected."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch

from qlora_lite.data.batches import largest_step
from qlora_lite.errors import DoesNotFit
from qlora_lite.model.forward import causal_lm
from qlora_lite.training import loop, step
from qlora_lite.training.footprint import Footprint
from qlora_lite.training.loop import TrainSettings, train_steps
from qlora_lite.training.preflight import try_largest_batch
from qlora_lite.training.state import TrainState
from tests.tiny_model import random_rows, set_dropout
from tests.training.test_loop import LABELS, factors_of, fresh_state, same, sampler_of

WIDE = Footprint(48, 0)


@dataclass
class Fault:
    """Stands in for `batch_loss`: memory runs out in the calls that `when` says, after the work of that call is done."""

    when: set[int]
    calls: int = 0
    said: list[str] = field(default_factory=list)
    left: list[weakref.ref] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Fault":
        real = step.batch_loss

        def batch_loss(*arguments, **keywords):
            self.calls += 1
            loss = real(*arguments, **keywords)
            if self.calls in self.when:
                self.left.append(weakref.ref(loss))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return loss

        monkeypatch.setattr(step, "batch_loss", batch_loss)
        return self


def dropping_state() -> TrainState:
    """Its result depends on the random numbers that each pass draws."""
    state = fresh_state()
    set_dropout(state.model, 0.1)
    return state


def to_checkpointing(footprint: Footprint) -> Footprint | None:
    """Leaner without another split."""
    return None if footprint.checkpoint_every else Footprint(footprint.micro_batch_tokens, 1, footprint.head_chunk)


def to_half(footprint: Footprint) -> Footprint | None:
    return (
        Footprint(footprint.micro_batch_tokens // 2, footprint.checkpoint_every)
        if footprint.micro_batch_tokens > 24
        else None
    )


def train(state: TrainState, *, leaner=to_checkpointing, say=lambda text: None, num_steps: int = 3):
    rows = random_rows(LABELS)
    state.footprint = state.footprint or WIDE
    torch.manual_seed(7)
    return list(
        train_steps(
            state,
            rows,
            sampler_of(rows, max_steps=num_steps),
            TrainSettings("cpu", 1e-3, "cosine", 0.2, 1.0),
            leaner=leaner,
            say=say,
        )
    )


def num_micro_batches() -> int:
    return sum(stats.num_micro_batches for stats in train(fresh_state()))


@pytest.mark.parametrize("call", range(1, num_micro_batches() + 1))
def test_a_step_without_memory_is_repeated_leaner_and_ends_as_if_nothing_had_happened(call, monkeypatch):
    expected = dropping_state()
    train(expected)
    state = dropping_state()
    fault = Fault({call}).install(monkeypatch)
    stats = train(state, say=fault.said.append)
    assert same(factors_of(state), factors_of(expected)) and len(stats) == 3
    assert state.footprint == Footprint(48, 1) and causal_lm(state.model).is_gradient_checkpointing
    assert len(fault.said) == 1 and "out of memory" in fault.said[0] and "every layer checkpointed" in fault.said[0]
    assert [ref() for ref in fault.left] == [None]  # nothing of the failed pass is alive


def test_another_split_gives_the_same_but_for_rounding(monkeypatch):
    expected, state = fresh_state(), fresh_state()
    whole = train(expected)
    fault = Fault({2}).install(monkeypatch)
    stats = train(state, leaner=to_half, say=fault.said.append)
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in whole], rel=1e-4)
    assert sum(s.num_micro_batches for s in stats) > sum(s.num_micro_batches for s in whole)


def test_with_nothing_leaner_left_the_run_stops_with_the_state_of_the_step_before(monkeypatch):
    expected, state = fresh_state(), fresh_state()
    train(expected, num_steps=1)
    first = train(fresh_state(), num_steps=1)[0].num_micro_batches
    Fault({first + 1, first + 2}).install(monkeypatch)
    with pytest.raises(DoesNotFit, match=r"step 2: out of memory .* even with the leanest settings"):
        train(state)
    assert state.step == 1
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_out_of_memory_inside_the_update_is_not_repeated(monkeypatch):
    state, calls = fresh_state(), []

    def step(self, *arguments, **keywords):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(state.optimizer), "step", step)
    with pytest.raises(DoesNotFit, match="step 1: out of memory while the weights were updated"):
        train(state)
    assert len(calls) == 1 and state.step == 0


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(loop, "update", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(fresh_state())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_all_names_of_a_lack_of_memory_are_known(error):
    assert step.is_out_of_memory(error)


def test_the_new_setting_enters_the_checkpoint(monkeypatch, tmp_path):
    state = fresh_state()
    Fault({1}).install(monkeypatch)
    train(state)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state.save(folder, base=tmp_path)
    again = fresh_state()
    again.load(folder)
    assert again.footprint == Footprint(48, 1)
    train(again, num_steps=4)
    assert again.footprint == Footprint(48, 1) and causal_lm(again.model).is_gradient_checkpointing


def fly(state: TrainState, *, leaner=to_checkpointing, say=lambda text: None):
    rows = random_rows(LABELS)
    sampler = sampler_of(rows)
    state.footprint = state.footprint or WIDE
    return try_largest_batch(
        state, lambda footprint: largest_step(rows, sampler, footprint.micro_batch_tokens, first=0), device="cpu",
        leaner=leaner, say=say,
    )  # fmt: skip


def test_a_preflight_leaves_everything_as_it_was():
    expected, state = dropping_state(), dropping_state()
    before = torch.get_rng_state()
    fly(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    train(expected)
    train(state)
    assert same(factors_of(state), factors_of(expected))


def test_a_preflight_without_memory_goes_leaner_before_the_first_step(monkeypatch):
    state, said = fresh_state(), []
    Fault({1}).install(monkeypatch)
    fly(state, say=said.append)
    assert state.footprint == Footprint(48, 1) and "trying the largest micro-batch: out of memory" in said[0]


def test_a_preflight_says_what_each_layer_holds_and_its_parts_are_those_of_the_ledger(monkeypatch):
    state = fresh_state()
    state.footprint = Footprint(24, 0)  # several micro-batches, so that gradients are there before the last
    found = fly(state)
    assert found.phases.keys() == {"forward", "head", "backward"}
    weights = sum(p.nbytes for p in state.model.parameters() if not p.requires_grad)
    trained = [p for p in state.model.parameters() if p.requires_grad]
    for parts in found.phases.values():
        assert parts["weights"] >= weights and parts["adapter"] == sum(p.nbytes for p in trained)
        assert parts["gradients"] == sum(4 * p.numel() for p in trained)
    layers = [str(i) for i in range(causal_lm(state.model).config.num_hidden_layers)]
    names = [moment.name for moment in found.moments]
    assert names == [*layers, "head", *reversed(layers), "embedding"]
    assert max(moment.num_bytes for moment in found.moments) == max(
        sum(parts.values()) for parts in found.phases.values()
    )
