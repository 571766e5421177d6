"""The plan knows trees: the meta ledger is the real one's to the byte, the planned peak the allocator's within 1%."""

from dataclasses import replace

import pytest

from qlora_lite.data.batches import pack_trees
from qlora_lite.data.template import Encoded
from qlora_lite.data.trees import Sharing, sharing
from qlora_lite.evaluation.generate import _Prompts, generating, read_prompts
from qlora_lite.memory.ledger import Ledger
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.resident import residents
from qlora_lite.plan.planner import largest_tree
from qlora_lite.plan.rehearsal import MicroBatch, Scene, meta_batch, num_labels
from qlora_lite.plan.scoring import _read
from qlora_lite.plan.workspace import workspace_of
from tests.promises.test_promise_06_plan import CPU, measured_and_planned, real_batch, real_ledger, real_model
from tests.tiny_model import Rows

TREE = MicroBatch(100, 5, 0.1, is_first=True, trunk=60)


def test_a_meta_tree_has_the_shapes_of_a_real_one():
    real, meta = real_batch(TREE), meta_batch(TREE)
    assert (real.lengths, real.parents) == (meta.lengths, meta.parents)
    assert real.input_ids_1T.shape == meta.input_ids_1T.shape == (1, TREE.num_tokens) == (1, 60 + 5 * 40)
    assert real.predictor_N.shape == meta.predictor_N.shape


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_meta_ledger_of_a_tree_is_the_real_one_to_the_byte(method, every):
    settings = replace(CPU, method=method, checkpoint_every=every)
    model = real_model(settings)
    scene = Scene(causal_lm(model).config, settings)
    scene.rehearse(TREE)
    assert scene.peak_totals == real_ledger(model, settings, TREE)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_planned_peak_of_a_tree_meets_the_allocators(method):
    settings = replace(CPU, method=method)
    tree = MicroBatch(300, 6, 0.05, is_first=True, trunk=220)
    measured, planned = measured_and_planned(real_model(settings), settings, tree)
    assert measured == pytest.approx(planned, rel=0.01)


def test_reading_prompts_on_meta_holds_what_reading_does_to_the_byte():
    model = real_model(CPU)
    scene = Scene(causal_lm(model).config, CPU)
    _, planned = _read(scene, 4, 50)
    tree = pack_trees(_Prompts([[10 * i + 3] * 50 for i in range(4)]), range(4))
    ledger = Ledger(workspace=workspace_of(CPU.card, num_threads=CPU.num_threads))
    for category, tensors in residents(model).items():
        ledger.hold(category, *tensors)
    ledger.hold("activations", tree.input_ids_1T, tree.position_ids_1T, tree.predictor_N, tree.target_N)
    with ledger, generating(model):
        read_prompts(model, tree)
    assert sum(planned.values()) == ledger.peak_bytes


def test_the_largest_tree_is_full():
    sharing = Sharing(num_alone=1000, num_packed=400, trunk=240, branch=30, num_labels=6)
    for tokens in (250, 271, 300, 512, 2048):
        batch = largest_tree(tokens, sharing)
        assert tokens - batch.num_examples < batch.num_tokens <= tokens and batch.trunk < batch.length
        assert num_labels(batch) in (5, 6, 7)


def test_no_micro_batch_is_planned_fuller_than_the_fullest_step():
    passages = [[1000 * passage + i for i in range(100)] for passage in range(3)]
    rows = Rows([Encoded([*tokens, own, 7], ((101, 102),)) for tokens in passages for own in range(4)])
    found = sharing(rows, [range(4), range(12)])
    assert (found.most_tokens, found.most_rows) == (3 * 100 + 12 * 2, 12)
    full = largest_tree(4096, found)
    assert (full.num_tokens, full.num_examples) == (found.most_tokens, found.most_rows)
    assert largest_tree(200, found).num_tokens <= 200
    assert num_labels(full) == 1
