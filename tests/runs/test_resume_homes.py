"""A run may be resumed with other homes for the parts of its model, which change no bit, but not with other chunks."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_lite import api
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.folder import RunDir
from qlora_lite.training.footprint import Footprint
from tests.tiny_run import train_cli, write_recipe

CHUNKS = "memory.chunk_tokens=24"
HOMES = ("memory.layer_inputs=host_fewest", "memory.resident_layers=0", "memory.head=streamed")


def flags(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), learning_rate=2e-3)


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in chunks that was stopped after its second step of four."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    plan = api.make_plan(load_recipe(recipe, overrides=[CHUNKS]))
    list(api.train(plan, api.load_model(plan), run, should_stop=lambda: len(RunDir(run).read_steps()) == 2))
    return run


def test_a_run_that_is_resumed_with_other_homes_is_the_one_that_never_stopped(recipe, stopped, tmp_path):
    run, whole = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "whole"
    assert train_cli(recipe, whole, *flags(CHUNKS), "--json").code == 0
    done = train_cli(recipe, run, "--resume", *flags(CHUNKS, *HOMES), "--json")
    assert done.code == 0, done.stderr
    assert "memory.layer_inputs was device, is host_fewest from now on; it does not affect training" in done.stderr
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    state = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    assert Footprint.from_json(state["footprint"]).policy.layer_inputs == "host_fewest"


def test_other_chunks_are_refused(recipe, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    done = train_cli(recipe, run, "--resume", *flags("memory.chunk_tokens=12"))
    assert done.code == 2 and "memory.chunk_tokens was 24, is 12" in done.stderr
