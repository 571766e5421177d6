"""Attention over a prefix tree against one dense mask: values and gradients, by every kernel; and what a row may look like."""

import pytest
import torch

from qlora_lite.model import tree_attention as tree
from qlora_lite.model.tree_attention import NO_PARENT, parts_of

LENGTHS = (7, 3, 5, 2, 4, 6, 1)
PARENTS = (NO_PARENT, 0, 1, 1, 0, NO_PARENT, 5)
KERNELS = {"flash": tree._FlashOnCpu, "plain": tree._Plain}


def visible(lengths, parents) -> torch.Tensor:
    """[T, T], by the definition: ancestors whole, oneself causally."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = len(segment)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        lineage, at = set(), int(segment[q])
        while at != NO_PARENT:
            lineage.add(at)
            at = parents[at]
        for k in range(q + 1):
            mask[q, k] = int(segment[k]) in lineage
    return mask


def inputs(dtype, heads=4, key_value=2, width=16):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    made = [torch.randn(1, total, h, width, dtype=dtype) for h in (heads, key_value, key_value)]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]  # as a model has them: not contiguous


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_attention_with_a_mask(kernel, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(tree, "kernel_for", lambda query, value, trains: KERNELS[kernel]())
    ours, theirs = inputs(dtype), [tensor.detach().double().requires_grad_() for tensor in inputs(dtype)]
    output = tree.tree_attention(*ours, parts_of(LENGTHS, PARENTS), scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=visible(LENGTHS, PARENTS), scale=0.3, enable_gqa=True
    )
    torch.manual_seed(1)
    weight = torch.randn_like(expected)
    (output.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, exact in [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]:
        assert ((mine.double() - exact).norm() / exact.norm()).item() < tolerance


def test_a_branch_that_saw_its_sibling_would_be_noticed():
    """What is changed in one branch reaches that branch and its descendants, and nothing else."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    for changed, reached in ((1, {1, 2, 3}), (4, {4}), (0, {0, 1, 2, 3, 4}), (5, {5, 6})):
        query, key, value = (tensor.detach() for tensor in inputs(torch.float32))
        before = tree.tree_attention(query, key, value, parts_of(LENGTHS, PARENTS), scaling=0.3)
        place = slice(starts[changed], starts[changed] + LENGTHS[changed])
        key, value = key.clone(), value.clone()
        key[:, :, place] += 1
        value[:, :, place] += 1
        after = tree.tree_attention(query, key, value, parts_of(LENGTHS, PARENTS), scaling=0.3)
        differs = (before != after).any(dim=-1).any(dim=1)[0]
        found = {i for i, a in enumerate(starts) if differs[a : a + LENGTHS[i]].any()}
        assert found == reached


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((3, 3), (NO_PARENT, 1)),  # its own parent
        ((3, 3), (1, NO_PARENT)),  # a parent that comes later
        ((3, 3, 3), (NO_PARENT, NO_PARENT, 0)),  # another root between
        ((3, 3, 3, 3), (NO_PARENT, 0, 0, 1)),  # a sibling between
    ],
)
def test_segments_that_are_out_of_order_are_refused(lengths, parents):
    with pytest.raises(ValueError, match="without a gap"):
        parts_of(lengths, parents)


def test_examples_that_share_nothing_are_parts_of_their_own():
    parts = parts_of((2, 3), (NO_PARENT, NO_PARENT))
    assert [(part.queries, part.keys, part.is_causal) for part in parts] == [
        (slice(0, 2), slice(0, 2), True), (slice(2, 5), slice(2, 5), True),
    ]  # fmt: skip
