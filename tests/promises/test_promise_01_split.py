"""Promise 1: splitting a step into micro-batches does not change the gradient, also with very unequal label counts."""

import random
from types import SimpleNamespace

import pytest
import torch

from qlora_lite.base.artefact import quantize_base
from qlora_lite.base.source import find_base
from qlora_lite.data.batches import make_batches
from qlora_lite.device.accelerator import cpu_multiplies_bf16
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.head import summed_loss
from qlora_lite.model.load import checkpoint_activations, load_base
from qlora_lite.training.step import batch_loss
from tests.random_tree import random_tree
from tests.tiny_model import (
    UNEQUAL_LABELS,
    gradients,
    move_factors,
    random_rows,
    relative_difference,
    split_batches,
    take_gradients,
    tiny_adapted,
)

TOLERANCE = 1e-5


def assert_split_does_not_matter(model, rows, *, splits=(2, 4, 16)):
    """-> the gradient of the rows in one micro-batch."""
    whole = gradients(model, split_batches(rows, 1))
    assert all(gradient.dtype == torch.float32 for gradient in whole.values())
    assert all(gradient.norm() > 0 for gradient in whole.values())
    for num_batches in splits:
        assert relative_difference(gradients(model, split_batches(rows, num_batches)), whole) < TOLERANCE, num_batches
    return whole


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batch_split_does_not_change_the_gradient(checkpointing):
    model = tiny_adapted()
    checkpoint_activations(causal_lm(model), every=int(checkpointing))
    assert_split_does_not_matter(model, random_rows(UNEQUAL_LABELS))


def test_the_order_of_examples_does_not_change_the_gradient():
    model, rows = tiny_adapted(), random_rows(UNEQUAL_LABELS)
    batches = split_batches(rows, 4)
    assert relative_difference(gradients(model, batches[::-1]), gradients(model, batches)) < TOLERANCE


def test_a_mean_of_micro_batch_means_would_change_the_gradient():
    """What many trainers do; shows that the tests above can fail."""
    model, rows = tiny_adapted(), random_rows(UNEQUAL_LABELS)
    whole = gradients(model, split_batches(rows, 1))
    batches = split_batches(rows, 16)
    for batch in batches:
        (batch_loss(model, batch) / len(batch.target_N) / len(batches)).backward()
    assert relative_difference(take_gradients(model), whole) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_trees_does_not_change_the_gradient(seed):
    """The trunk is computed again in every part, with a share of the gradient in each."""
    rows = random_tree(random.Random(seed), depth=3, fan=5)
    model = tiny_adapted(compute=torch.float32, factors=torch.float32)
    whole, *parts = [
        make_batches(rows, range(len(rows)), micro_batch_tokens=tokens, share_prefixes=True)
        for tokens in (10_000, 300, 150, 1)
    ]
    assert len(whole) == 1 and len(parts[0]) < len(parts[1]) < len(parts[2]) == len(rows)
    expected = gradients(model, whole)
    for batches in parts:
        assert relative_difference(gradients(model, batches), expected) < TOLERANCE, len(batches)


@pytest.mark.slow
def test_a_label_alone_has_the_gradient_it_has_among_others():
    """A head of a real model's size: there the matrix kernel for one row sums in another order than the one for many."""
    head = torch.nn.Linear(576, 49_152, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    torch.nn.init.normal_(head.requires_grad_(False).weight, std=0.024)
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace())
    hidden_ND, target_N = torch.randn(40, 576).bfloat16().requires_grad_(), torch.arange(40)
    summed_loss(model, hidden_ND, target_N).backward()
    whole, hidden_ND.grad = hidden_ND.grad, None
    some = slice(0, 8)
    for i in range(40)[some]:
        summed_loss(model, hidden_ND[i : i + 1], target_N[i : i + 1]).backward()
    assert (hidden_ND.grad[some].float() - whole[some].float()).norm() < 1e-6 * whole[some].float().norm()


@pytest.mark.slow
def test_micro_batch_split_does_not_change_the_gradient_of_the_real_model(real_home):
    """In bf16, where the program chooses that: to the same tolerance if a row's products have the same bits however many rows there are,
    else within bf16's own rounding."""
    rows, splits = random_rows(UNEQUAL_LABELS, vocab=49_000, prompt=(3, 8)), (2, 16)  # the tiny model has those between
    in_fp32 = real_model(real_home, torch.float32)
    whole_in_fp32 = assert_split_does_not_matter(in_fp32, rows, splits=splits)
    if not cpu_multiplies_bf16():
        return
    in_bf16 = real_model(real_home, torch.bfloat16)
    if rows_are_independent():
        assert_split_does_not_matter(in_bf16, rows, splits=splits)
    whole = gradients(in_bf16, split_batches(rows, 1))
    rounding = relative_difference(whole, whole_in_fp32)
    assert rounding < 0.2
    for num_batches in splits:
        assert relative_difference(gradients(in_bf16, split_batches(rows, num_batches)), whole) < rounding, num_batches


def real_model(home, compute):
    base = load_base(quantize_base(find_base("smollm2-135m", cache=home), cache=home), device="cpu", compute=compute)
    model = attach_adapter(base.model, Lora(r=4, lora_alpha=8), factor_dtype=compute)
    move_factors(model, std=0.005)
    return model


def rows_are_independent():
    """Not on processors with AMX: there oneDNN sums in an order that depends on the number of rows."""
    for k, m in ((576, 1536), (1536, 576), (576, 576)):
        left, right = torch.randn(600, k).bfloat16(), torch.randn(m, k).bfloat16()
        whole = left @ right.T
        if any(not torch.equal(left[:n] @ right.T, whole[:n]) for n in (20, 70, 150, 300)):
            return False
    return True
