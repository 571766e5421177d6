"""The plan of every home: the meta ledger is the real one to the byte in both pools, and few layers tell any depth."""

from dataclasses import replace
from functools import cache

import pytest
from transformers import PreTrainedConfig

from qlora_lite.base.source import load_config
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.policy import Policy
from qlora_lite.plan.rehearsal import Body, MicroBatch, Scene, Settings, Stage, of_body, with_depth
from qlora_lite.training.footprint import Footprint, apply_footprint
from tests.architectures import artefact, published
from tests.promises.test_promise_06_plan import CPU, lengthened, real_model, real_pools
from tests.tiny_model import tiny_source

POLICIES = [
    Policy(layer_inputs="fewest"),
    Policy(layer_inputs="host"),
    Policy(chunk_tokens=48),
    Policy(chunk_tokens=48, layer_inputs="fewest"),
    Policy(chunk_tokens=48, layer_inputs="host"),
    Policy(chunk_tokens=48, resident_layers=0),
    Policy(chunk_tokens=48, layer_inputs="fewest", resident_layers=1),
    Policy(chunk_tokens=48, layer_inputs="host", embeddings="host", head="streamed"),
    Policy(chunk_tokens=48, layer_inputs="host_fewest", embeddings="host", head="streamed", resident_layers=0),
    Policy(
        chunk_tokens=48,
        layer_inputs="host_fewest",
        embeddings="host",
        head="streamed",
        resident_layers=0,
        keys_values="host",
    ),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("trunk", [0, 40])
def test_the_meta_ledger_is_the_real_one_to_the_byte_in_both_pools(policy, trunk):
    check_pools(replace(CPU, policy=policy), real_model(CPU), MicroBatch(100, 2, 0.1, is_first=True, trunk=trunk))


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral"])
def test_so_it_is_for_other_architectures(name):
    settings = replace(CPU, policy=POLICIES[-1])
    check_pools(settings, real_model(CPU, quantized=artefact(name)), MicroBatch(60, 2, 0.1, is_first=True))


def check_pools(settings, model, micro_batch) -> None:
    apply_footprint(model, Footprint(0, policy=settings.policy))
    scene = Scene(causal_lm(model).config, settings)
    planned = scene.rehearse(micro_batch)
    totals, on_host = real_pools(model, settings, micro_batch)
    assert scene.peak_totals == totals
    assert planned.host_parts == on_host


# Every policy at one depth, and at a second one those whose memory is not linear in it.
DEPTHS = [
    *((7, policy) for policy in (Policy(), *POLICIES)),
    *((12, policy) for policy in POLICIES if policy.keeps_fewest or policy.resident_layers is not None),
]


@pytest.mark.parametrize(("depth", "policy"), DEPTHS, ids=str)
def test_few_layers_tell_any_depth(depth, policy):
    deep = with_depth(lengthened(load_config(tiny_source()), depth), depth)
    settings, micro_batch = replace(CPU, policy=policy), MicroBatch(50, 2)
    stage, scene = Stage(deep, settings, bodies=shared_body), Scene(deep, settings, shared_body(deep, settings))
    assert stage.rehearse(micro_batch) == scene.rehearse(micro_batch)


def test_a_model_serves_every_policy_whatever_was_rehearsed_on_it_before():
    config, micro_batch = with_depth(load_config(tiny_source()), 2), MicroBatch(50, 2)
    body, scenes = Body(config, CPU), {}
    for policy in (Policy(), POLICIES[-1], POLICIES[5], Policy(), POLICIES[-1]):
        settings = replace(CPU, policy=policy)
        expected = Scene(config, settings).rehearse(micro_batch)
        assert Scene(config, settings, body).rehearse(micro_batch) == expected
        assert scenes.setdefault(policy, Scene(config, settings, body)).rehearse(micro_batch) == expected


def shared_body(config: PreTrainedConfig, settings: Settings) -> Body:
    """The tiny model of some depth, which all policies share, as the planner's do."""
    assert of_body(settings) == of_body(CPU)
    return body_of_depth(config.num_hidden_layers)


@cache
def body_of_depth(depth: int) -> Body:
    return Body(with_depth(lengthened(load_config(tiny_source()), depth), depth), CPU)


def test_few_layers_tell_any_depth_of_a_pattern_of_layers():
    config = load_config(published("gemma3_text"))
    deep = with_depth(lengthened(config, 13), 13)
    settings, micro_batch = replace(CPU, policy=replace(POLICIES[-1], resident_layers=5)), MicroBatch(50, 2)
    assert Stage(deep, settings).rehearse(micro_batch) == Scene(deep, settings).rehearse(micro_batch)
