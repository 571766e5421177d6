"""Promise 3: a packed prefix tree equals separate examples, loss and gradient."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lite.data.batches import make_batches, pack_trees
from qlora_lite.model.attention import PACKED
from qlora_lite.model.forward import predicting_states
from tests.random_tree import VOCABULARY, random_tree
from tests.tiny_model import SIZES, gradients, relative_difference, split_batches, tiny_adapted


def double_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).double()
    model.set_attn_implementation(PACKED)
    return model


def loss_and_gradient(model: LlamaForCausalLM, batches) -> tuple[float, torch.Tensor]:
    """In fp64 to the end: the head of training sums up in fp32 (model/head.py)."""
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        states_ND = predicting_states(
            model, input_ids_1T=batch.input_ids_1T, position_ids_1T=batch.position_ids_1T, lengths=batch.lengths,
            parents=batch.parents, predictor_N=batch.predictor_N,
        )  # fmt: skip
        loss = loss + torch.nn.functional.cross_entropy(model.lm_head(states_ND), batch.target_N, reduction="sum")
    found = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([grad.flatten() for grad in found])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), depth=st.integers(1, 4), fan=st.integers(1, 4))
def test_a_packed_tree_equals_separate_examples_in_fp64(seed, depth, fan):
    rows = random_tree(random.Random(seed), depth=depth, fan=fan)
    model = double_llama()
    alone = loss_and_gradient(model, split_batches(rows, len(rows)))
    tree = pack_trees(rows, range(len(rows)))
    assert sorted(tree.rows) == list(range(len(rows)))
    together = loss_and_gradient(model, [tree])
    assert together[0] == pytest.approx(alone[0], rel=1e-9)
    # norms and rotations are fp32 in any model
    assert ((together[1] - alone[1]).norm() / alone[1].norm()).item() < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_so_it_is_on_the_quantized_base_by_trainings_own_code(seed):
    """In fp32 to its rounding; in bf16 no farther from the gradient of fp32 than the separate rows are."""
    rows = random_tree(random.Random(seed), depth=3, fan=4)
    trees = make_batches(rows, range(len(rows)), micro_batch_tokens=200, share_prefixes=True)
    assert len(trees) > 1 and sum(batch.input_ids_1T.shape[1] for batch in trees) < rows.lengths.sum()
    exact = tiny_adapted(compute=torch.float32, factors=torch.float32)
    alone = gradients(exact, split_batches(rows, len(rows)))
    assert relative_difference(gradients(exact, trees), alone) < 1e-5
    rounded = tiny_adapted()
    distances = [
        relative_difference(gradients(rounded, batches), alone) for batches in (trees, split_batches(rows, len(rows)))
    ]
    assert distances[0] < 1.25 * distances[1]
