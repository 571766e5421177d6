"""The ledger on toys whose bytes are counted by hand, on meta and on the CPU alike."""

import pytest
import torch

from qlora_lite.device.card import COMMON_CARD, CPU
from qlora_lite.memory.ledger import PAGED, Ledger, card_of, count_as_after, counted_as

KIB = 1024


def kib(num: int, device: str) -> torch.Tensor:
    return torch.empty(num * KIB, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_storages_count_from_birth_to_death_and_views_do_not(device):
    held = kib(100, device)
    ledger = Ledger()
    ledger.hold("weights", held, held[:10])
    with ledger:
        a = kib(10, device)
        view = a.view(2, -1)[0]
        with counted_as("workspace"):
            b = a + 1
            del b
        assert ledger.total_bytes == 110 * KIB
        del a
        assert ledger.total_bytes == 110 * KIB  # the view holds the storage
        del view
    assert ledger.total_bytes == 100 * KIB and ledger.live["weights"] == 100 * KIB
    assert ledger.peaks["workspace"] == {"weights": 100 * KIB, "activations": 10 * KIB, "workspace": 10 * KIB}
    assert ledger.peak_bytes == 120 * KIB
    del held
    assert ledger.total_bytes == 0


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_autograd_keeps_what_it_saves_until_the_backward_pass(device):
    weight = torch.ones(4, 4, device=device, requires_grad=True)  # 64 bytes
    ledger = Ledger()
    with ledger:
        y = (weight * weight).exp().sum()  # exp keeps its result, mul keeps its inputs
        assert ledger.total_bytes == 64 + 4  # what exp keeps, and y
        y.backward()
        assert ledger.total_bytes == 64 + 4  # the gradient, and y
    assert weight.grad is not None


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_gradients_add_up_where_they_lie_as_they_do_without_a_ledger(device):
    """A weight that is used three times: autograd adds the second and third gradient to the first one, and makes no sum beside it."""
    weight = torch.ones(KIB, device=device, requires_grad=True)
    factor = torch.full((KIB,), 2.0, device=device)
    losses = [(weight * factor).sum() for _ in range(3)]
    with Ledger() as ledger:
        torch.autograd.backward(losses)
    assert ledger.peak_bytes <= 2 * 4 * KIB + 100  # the sum and the next gradient
    if device == "cpu":
        assert torch.equal(weight.grad, torch.full((KIB,), 6.0))


def test_a_gradient_that_two_hold_is_not_added_to():
    x = torch.ones(4, requires_grad=True)
    with Ledger():
        u, v = x * 2, x * 3
        (((u + v) * 5) + u + v * 7).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0 * (5 + 1) + 3.0 * (5 + 7)))


def test_sizes_are_rounded_as_the_allocator_does():
    ledger = Ledger(card=COMMON_CARD)
    with ledger:
        tensors = [torch.empty(n, dtype=torch.uint8, device="meta") for n in (1, 512, 513)]
    assert ledger.total_bytes == 512 + 512 + 1024 and len(tensors) == 3


def test_what_an_operator_holds_inside_is_said_by_the_table():
    ledger = Ledger(workspace=lambda func, args, kwargs, out: 1000 if func is torch.ops.aten.mm.default else 0)
    with ledger:
        x = torch.empty(10, 10, device="meta")
        y = x @ x
    assert ledger.peak == {"activations": 800, "workspace": 1000} and y.shape == (10, 10)


def test_paged_bytes_are_counted_apart():
    ledger = Ledger()
    with ledger, counted_as(PAGED):
        state = kib(5, "meta")
    assert (ledger.live[PAGED], ledger.total_bytes, ledger.peak) == (5 * KIB, 0, {})
    assert state.numel() == 5 * KIB


def test_a_category_can_begin_when_a_gradient_arrives():
    x = torch.ones(4, device="meta", requires_grad=True)
    ledger = Ledger()
    with ledger:
        hidden = x * 2
        count_as_after(hidden, "recompute")
        (hidden * 3).sum().backward()
        later = torch.empty(25, dtype=torch.float32, device="meta")
    assert ledger.live["recompute"] >= later.nbytes


def test_meta_tensors_stand_for_the_ledgers_card_and_items_can_be_read():
    x = torch.ones((), device="meta")
    assert card_of(x) == CPU
    with Ledger(card=COMMON_CARD):
        assert card_of(x) == COMMON_CARD and card_of(torch.ones(())) == CPU
        assert isinstance(x.item(), float)


def test_without_a_ledger_the_marks_do_nothing():
    with counted_as("logits"):
        x = torch.ones(2, requires_grad=True)
    count_as_after(x, "recompute")
    x.sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_who_asks_a_meta_tensor_for_its_value_is_told_what_the_ledger_answers():
    ledger, asked = Ledger(), []
    with ledger:
        mask = torch.empty(4, dtype=torch.bool, device="meta")
        assert mask.all() and mask.sum().item() == 1.0
        ledger.answer = lambda operator: asked.append(operator) or float(operator is torch.ops.aten.any.default)
        assert mask.any() and not mask.all()
    assert asked == [torch.ops.aten.any.default, torch.ops.aten.all.default]
