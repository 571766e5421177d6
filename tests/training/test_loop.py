"""The loop: what a step reports, what is trained when, and how it stops by itself."""

import re
from dataclasses import fields, replace

import pytest
import torch

from qlora_lite.data.batches import StepSampler, make_batches
from qlora_lite.errors import TrainingStopped
from qlora_lite.model.load import load_base
from qlora_lite.model.trained import make_trainable
from qlora_lite.training import loop
from qlora_lite.training.best import Best
from qlora_lite.training.footprint import Footprint
from qlora_lite.training.loop import TrainSettings, train_steps
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.schedule import learning_rate_at
from qlora_lite.training.state import TrainState
from tests.tiny_model import gradients, random_rows, tiny_adapted, tiny_source

LABELS = [3, 5, 1, 9, 2, 7, 4, 4, 6, 1]
POISON = 299  # a token that only the row made by `poisoned_rows` has


def fresh_state(**model) -> TrainState:
    model = tiny_adapted(**model)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-3, weight_decay=0.0)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def sampler_of(rows, *, max_steps=None, epochs=1, examples_per_step=4):
    return StepSampler(len(rows), examples_per_step=examples_per_step, epochs=epochs, max_steps=max_steps, seed=0)


def steps_of(state, rows, sampler, **changes):
    own = {field.name for field in fields(TrainSettings)}
    settings = replace(TrainSettings("cpu", 1e-3, "cosine", 0.2, 1.0), **{k: v for k, v in changes.items() if k in own})
    state.footprint = changes.pop("footprint", None) or state.footprint or Footprint(48, 0)
    return train_steps(state, rows, sampler, settings, **{k: v for k, v in changes.items() if k not in own})


def factors_of(state):
    return [parameter.detach().clone() for parameter in state.model.parameters() if parameter.requires_grad]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_step_reports_what_it_did():
    rows, state = random_rows(LABELS), fresh_state()
    sampler = sampler_of(rows, epochs=2)
    stats = list(steps_of(state, rows, sampler))
    assert [s.step for s in stats] == [1, 2, 3, 4, 5, 6]
    assert {s.num_steps for s in stats} == {6}
    assert [s.num_examples for s in stats] == [4, 4, 2, 4, 4, 2]  # ten examples an epoch
    assert [s.epoch for s in stats] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert sum(s.num_label_tokens for s in stats) == 2 * sum(LABELS)
    assert sum(s.num_tokens for s in stats) == 2 * rows.lengths.sum()
    for step, s in enumerate(stats):
        batches = make_batches(rows, sampler.rows_of_step(step), micro_batch_tokens=48)
        assert s.num_micro_batches == len(batches)
        expected = learning_rate_at(step, num_steps=6, peak=1e-3, schedule="cosine", warmup_ratio=0.2)
        assert s.learning_rate == expected
        assert s.step_s > 0 and s.rss_bytes > 0 and s.loss > 0
    assert state.step == 6


def test_the_optimizer_takes_the_schedules_rate():
    rows, state = random_rows(LABELS), fresh_state()
    for s in steps_of(state, rows, sampler_of(rows), learning_rate=5e-4):
        assert {group["lr"] for group in state.optimizer.param_groups} == {s.learning_rate}


def test_the_gradient_is_clipped_before_the_update():
    rows, state = random_rows(LABELS), fresh_state()
    before = factors_of(state)
    next(steps_of(state, rows, sampler_of(rows), max_grad_norm=1e-25))  # far below AdamW's epsilon: no step at all
    assert same(factors_of(state), before)
    next(steps_of(state, rows, sampler_of(rows)))
    assert not same(factors_of(state), before)


def test_a_step_reports_the_norm_of_its_gradient_before_clipping():
    rows, state = random_rows(LABELS), fresh_state()
    sampler = sampler_of(rows, max_steps=1)
    batches = make_batches(rows, sampler.rows_of_step(0), micro_batch_tokens=48)
    expected = torch.cat([gradient.flatten() for gradient in gradients(state.model, batches).values()]).norm().item()
    (stats,) = steps_of(state, rows, sampler)
    assert stats.grad_norm == pytest.approx(expected, rel=1e-5)


def test_one_step_of_a_run_is_measured_and_its_peak_is_more_than_the_gradients():
    rows, state = random_rows(LABELS), fresh_state()
    peaks = [s.peak_bytes for s in steps_of(state, rows, sampler_of(rows, epochs=2))]
    measured = [peak for peak in peaks if peak is not None]
    assert len(measured) == 1
    assert measured[0] > sum(4 * factor.numel() for factor in factors_of(state))


def test_the_updates_own_memory_counts_where_it_is_the_most():
    """With every weight trained, fp32 copies of the largest one stand on top of all gradients."""
    model = load_base(tiny_source(), device="cpu").model
    make_trainable(model)
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-4, weight_decay=0.0)
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    rows = random_rows([1, 1], prompt=(2, 3))
    (stats,) = steps_of(state, rows, sampler_of(rows))
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    assert stats.peak_bytes is not None and stats.peak_bytes >= sum(sizes) + 2 * max(sizes)


def test_the_measured_step_is_the_one_that_packs_the_largest_micro_batch():
    rows = random_rows([2] * 8, prompt=(10, 10))
    long = random_rows([2], prompt=(40, 40)).encoded(0)
    rows._encoded[5], rows.lengths[5] = long, len(long.input_ids)
    sampler = sampler_of(rows, examples_per_step=2)
    stats = list(steps_of(fresh_state(), rows, sampler, footprint=Footprint(500, 0)))
    expected = next(step for step in range(4) if 5 in sampler.rows_of_step(step))
    assert [s.peak_bytes is not None for s in stats] == [step == expected for step in range(4)]


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was():
    rows, state = random_rows([4] * 4), fresh_state()
    base = {name: p.detach().clone() for name, p in state.model.named_parameters() if not p.requires_grad}
    losses = [s.loss for s in steps_of(state, rows, sampler_of(rows, max_steps=15), schedule="constant")]
    assert losses[-1] < losses[0] - 0.5
    for name, parameter in state.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, base[name]), name
        assert parameter.grad is None


def test_the_split_into_micro_batches_does_not_change_the_run():
    rows = random_rows(LABELS)
    losses = [
        [s.loss for s in steps_of(fresh_state(), rows, sampler_of(rows, max_steps=5), footprint=Footprint(tokens, 0))]
        for tokens in (1, 48, 10_000)
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_a_stopped_generator_leaves_a_state_that_goes_on_where_it_was():
    rows = random_rows(LABELS)
    whole, halves = fresh_state(), fresh_state()
    sampler = sampler_of(rows, max_steps=4)
    losses = [s.loss for s in steps_of(whole, rows, sampler)]
    first = steps_of(halves, rows, sampler)
    parts = [next(first).loss, next(first).loss]
    first.close()
    parts += [s.loss for s in steps_of(halves, rows, sampler)]
    assert parts == losses
    assert same(factors_of(halves), factors_of(whole))


def test_validation_comes_every_few_steps_and_after_the_last_and_the_best_is_remembered():
    rows, state = random_rows(LABELS), fresh_state()
    losses = iter([3.0, 2.0, 2.5])
    stats = list(
        steps_of(state, rows, sampler_of(rows, max_steps=5), evaluate=lambda: next(losses), eval_every_steps=2)
    )
    assert [s.eval_loss for s in stats] == [None, 3.0, None, 2.0, 2.5]
    assert state.best == Best(4, 2.0, num_since=1)


def test_validation_sees_the_model_after_the_update():
    rows, state = random_rows(LABELS), fresh_state()
    seen = []

    def evaluate():
        seen.append(factors_of(state))
        return 1.0

    for _ in steps_of(state, rows, sampler_of(rows, max_steps=2), evaluate=evaluate):
        assert same(seen[-1], factors_of(state))
    assert len(seen) == 2 and not same(seen[0], seen[1])


def test_the_seconds_of_an_evaluation_are_no_part_of_the_step(monkeypatch):
    rows, now_s = random_rows(LABELS), [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now_s[0])

    def evaluate():
        now_s[0] += 1000
        return 1.0

    stats = list(steps_of(fresh_state(), rows, sampler_of(rows, max_steps=3), evaluate=evaluate))
    assert now_s[0] == 3000 and [s.step_s for s in stats] == [0, 0, 0]


def test_training_stops_early_when_validation_has_not_fallen_for_so_many_evaluations():
    rows, state = random_rows(LABELS), fresh_state()
    losses = iter([3.0, 2.0, 2.0, 2.1, 0.0])
    settings = {"evaluate": lambda: next(losses), "eval_every_steps": 2, "early_stop": 2}
    sampler = sampler_of(rows, max_steps=20)
    stats = list(steps_of(state, rows, sampler, **settings))
    assert [s.step for s in stats] == [1, 2, 3, 4, 5, 6, 7, 8] and stats[-1].eval_loss == 2.1
    assert state.is_over(20, early_stop=2) and not state.is_over(20)
    assert list(steps_of(state, rows, sampler, **settings)) == []  # a resumed one has nothing left to do


def test_a_validation_loss_that_is_no_number_stops_training():
    rows, state = random_rows(LABELS), fresh_state()
    steps = steps_of(state, rows, sampler_of(rows), evaluate=lambda: float("nan"))
    with pytest.raises(TrainingStopped, match="stopped at step 1: the validation loss is nan") as caught:
        next(steps)
    assert not caught.value.state_is_good and state.best is None


def poisoned_rows():
    """Eight rows; row 6 holds a token whose embedding is made NaN."""
    rows = random_rows([3] * 8, vocab=POISON)
    rows.encoded(6).input_ids[1] = POISON
    return rows


def test_nan_stops_before_the_update_and_names_step_and_rows():
    rows, state = poisoned_rows(), fresh_state()
    state.model.get_input_embeddings().weight.data[POISON] = float("nan")
    sampler = sampler_of(rows, examples_per_step=2)
    bad_step = next(step for step in range(4) if 6 in sampler.rows_of_step(step))
    assert bad_step > 0  # so that there is a good step before it
    steps = steps_of(state, rows, sampler, footprint=Footprint(1, 0))
    for _ in range(bad_step):
        next(steps)
    good = state.snapshot()
    with pytest.raises(TrainingStopped) as caught:
        next(steps)
    assert f"stopped at step {bad_step + 1}: the loss is nan; rows row-6." in str(caught.value)
    assert caught.value.state_is_good and caught.value.exit_code == 2
    now = state.snapshot()
    assert now.facts == good.facts and state.step == bad_step
    for name, tensor in now.tensors.items():
        assert name.startswith("random/") or torch.equal(tensor, good.tensors[name]), name
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_update(monkeypatch):
    rows, state = random_rows(LABELS), fresh_state()
    before = factors_of(state)
    handle = next(p for p in state.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingStopped, match=r"stopped at step 1: the gradient is (inf|nan); rows row-") as caught:
        next(steps_of(state, rows, sampler_of(rows)))
    handle.remove()
    assert caught.value.state_is_good and state.step == 0
    assert same(factors_of(state), before)


def test_with_loss_scaling_a_gradient_that_overflows_skips_the_step_and_lowers_the_scale():
    rows, state = random_rows(LABELS), fresh_state(factors=torch.float32)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    steps = steps_of(state, rows, sampler_of(rows), warmup_ratio=0.0)
    before = factors_of(state)
    handle = next(p for p in state.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
    next(steps)
    assert same(factors_of(state), before) and state.scaler.get_scale() == 2.0**99
    handle.remove()
    next(steps)
    assert not same(factors_of(state), before)


def test_a_loss_far_above_where_it_began_stops_after_ten_steps():
    rows, state = random_rows([4] * 4), fresh_state()
    state.first_loss = 2.0  # the losses are near 6
    with pytest.raises(TrainingStopped) as caught:
        for _ in steps_of(state, rows, sampler_of(rows, max_steps=20), learning_rate=1e-6):
            pass
    assert re.match(
        r"stopped at step 10: the loss diverged: mean [56]\.\d\d over the last 10 steps, 2\.00 at the first step; rows row-",
        str(caught.value),
    )
    assert state.step == 10 and not caught.value.state_is_good


def test_a_loss_that_rises_a_little_is_no_divergence():
    rows, state = random_rows(LABELS), fresh_state()
    state.first_loss = 4.0  # the losses are near 6: not twice as much
    assert len(list(steps_of(state, rows, sampler_of(rows, max_steps=12), learning_rate=1e-6))) == 12
