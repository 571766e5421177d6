"""A timeline of a few steps: what is recorded, when, and that the training is the same."""

import gzip
import json

import pytest
import torch

from qlora_lite.training.trace import NUM_STEPS, Trace
from tests.tiny_model import random_rows
from tests.tiny_run import run_cli, write_recipe
from tests.training.test_loop import LABELS, fresh_state, sampler_of, steps_of


def traced(folder, **changes):
    """-> (losses of five steps, the trace)."""
    trace = Trace(folder, device="cpu")
    rows = random_rows(LABELS)
    steps = list(steps_of(fresh_state(), rows, sampler_of(rows, max_steps=5, epochs=5), trace=trace, **changes))
    return steps, trace


def events_of(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_two_steps_are_recorded_neither_the_first_nor_the_one_that_is_measured(tmp_path):
    steps, trace = traced(tmp_path / "profile")
    measured = {step.step for step in steps if step.peak_bytes is not None}
    recorded = [int(path.name.removeprefix("step-").removesuffix(".json.gz")) for path in trace.files]
    assert recorded == [step for step in (2, 3, 4, 5) if step not in measured][:NUM_STEPS]
    assert sorted(trace.files) == sorted((tmp_path / "profile").iterdir())


def test_a_timeline_has_the_operators_of_forward_backward_and_update(tmp_path):
    _, trace = traced(tmp_path)
    names = {event.get("name") for event in events_of(trace.files[0])}
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= names
    assert any("backward" in name for name in names if name) and any(
        "optimizer_update" in name for name in names if name
    )


def test_what_is_recorded_is_trained_all_the_same(tmp_path):
    steps, _ = traced(tmp_path)
    rows = random_rows(LABELS)
    plain = list(steps_of(fresh_state(), rows, sampler_of(rows, max_steps=5, epochs=5)))
    assert [step.loss for step in steps] == [step.loss for step in plain]
    assert [step.grad_norm for step in steps] == [step.grad_norm for step in plain]


def test_a_recorded_step_that_runs_out_of_memory_is_recorded_again_or_left_out(tmp_path):
    trace = Trace(tmp_path, device="cpu")
    trace.around(1, is_measured=False)
    for step in (2, 3):
        begin, end = trace.around(step, is_measured=False)
        with pytest.raises(torch.OutOfMemoryError), begin:
            raise torch.OutOfMemoryError("none left")
        begin, end = trace.around(step, is_measured=False)
        with begin:
            torch.ones(3).sum()
        with end:
            torch.ones(3).sum()
        trace.write()
    assert [path.name for path in trace.files] == ["step-000002.json.gz", "step-000003.json.gz"]
    begin, _ = trace.around(4, is_measured=False)
    with begin:
        pass
    trace.write()
    assert len(trace.files) == 2


def test_a_recording_that_did_not_come_to_its_end_is_dropped(tmp_path):
    trace = Trace(tmp_path, device="cpu")
    trace.around(1, is_measured=False)
    with trace.around(2, is_measured=False)[0]:
        pass
    trace.drop()
    trace.write()
    with torch.profiler.profile():  # torch's profiler is free again
        torch.ones(3).sum()
    assert trace.files == []


def test_train_profile_says_where_the_timeline_is(tmp_path):
    recipe = write_recipe(tmp_path)
    done = run_cli("train", str(recipe), "--run-dir", str(tmp_path / "run"), "--profile", "--json")
    assert done.code == 0, done.stderr
    files = sorted((tmp_path / "run" / "profile").iterdir())
    assert len(files) == NUM_STEPS and all(events_of(path) for path in files)
    assert str(files[0]) in "".join(done.stderr.split("\n")) and done.json["num_steps"] == 4
