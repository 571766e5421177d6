"""Numbers of the code that only a card runs, on the stand-in: against fp64, and against the CPU where that is the same arithmetic."""

import math

import pytest
import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.quantization import BLOCK
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.attention import packed_attention, padded_rows_attention
from qlora_lite.model.load import load_base
from qlora_lite.model.products import product_in_fp32
from qlora_lite.model.tree_attention import parts_of, tree_attention
from qlora_lite.training.optimizer import is_paged, make_optimizer, state_bytes
from tests import standin, tiny_model

standin.install()  # before the first backward pass of the process
LENGTHS, PARENTS = (40, 7, 1, 9, 30, 5, 6), (-1, 0, 0, 0, -1, 4, 4)
PRECISION = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 2e-7}


def mask_of(lengths: tuple[int, ...], parents: tuple[int, ...]) -> torch.Tensor:
    """[T, T]: what each token of the row sees."""
    total, starts = sum(lengths), [sum(lengths[:index]) for index in range(len(lengths))]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for start, length, parent in zip(starts, lengths, parents, strict=True):
        own = slice(start, start + length)
        mask[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
        while parent != -1:
            mask[own, starts[parent] : starts[parent] + lengths[parent]] = True
            parent = parents[parent]
    return mask


def inputs(
    dtype: torch.dtype, heads: int, key_heads: int, width: int, value_width: int, *, is_transposed: bool = True
) -> list[torch.Tensor]:
    """[1, H, T, d] as models make them: transposed views, or laid out so, where rotary code ends in a concatenation (Phi-3)."""
    sizes = (heads, width), (key_heads, width), (key_heads, value_width)
    rows = [torch.randn(1, sum(LENGTHS), *size).to(dtype).to(standin.NAME).transpose(1, 2) for size in sizes]
    return [(row if is_transposed else row.contiguous()).requires_grad_() for row in rows]


def in_fp64(tensors: list[torch.Tensor], mask: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of plain attention."""
    query, key, value = (tensor.detach().cpu().double().requires_grad_() for tensor in tensors)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * query.shape[-1] ** -0.5
    output = scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.repeat_interleave(groups, 1)
    (output * grad.double()).sum().backward()
    return [output.detach(), query.grad, key.grad, value.grad]


def distances(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a.detach().cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("card", "dtype", "shape", "kernel"),
    [
        ("rtx-4090", torch.bfloat16, (8, 2, 64, 64), "flash"),
        ("rtx-4090", torch.bfloat16, (4, 2, 60, 60), "flash"),  # filled up to 64
        ("rtx-4090", torch.bfloat16, (4, 4, 256, 256), "flash"),
        ("rtx-4090", torch.bfloat16, (2, 1, 200, 200), "efficient"),  # a width that flash does not train on this card
        ("a100-80gb", torch.bfloat16, (2, 1, 200, 200), "flash"),
        ("rtx-4090", torch.bfloat16, (2, 1, 264, 264), "efficient"),
        ("rtx-4090", torch.bfloat16, (4, 4, 96, 64), "efficient"),
        ("rtx-4090", torch.float32, (8, 2, 64, 64), "efficient"),
        ("t4", torch.float16, (8, 2, 64, 64), "efficient"),
        ("t4", torch.float16, (4, 2, 60, 60), "efficient"),
        ("gtx-1080-ti", torch.float32, (4, 2, 64, 64), "efficient"),
    ],
)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_attention_over_trees_takes_the_cards_kernel_and_is_that_of_plain_attention(
    card, dtype, shape, kernel, is_transposed
):
    with standin.card(card):
        tensors = inputs(dtype, *shape, is_transposed=is_transposed)
        output = tree_attention(*tensors, parts_of(LENGTHS, PARENTS), scaling=shape[2] ** -0.5)
        grad = torch.randn(output.shape).to(dtype)
        (output * grad.to(standin.NAME)).sum().backward()
        assert set(standin.calls) == {kernel, f"{kernel} backward"}
    expected = in_fp64(tensors, mask_of(LENGTHS, PARENTS), grad)
    assert max(distances([output, *(tensor.grad for tensor in tensors)], expected)) < PRECISION[dtype]


@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize("card", ["rtx-4090", "t4"])
def test_rows_without_sharing_and_sliding_windows_never_take_plain_products(card, window):
    dtype = torch.bfloat16 if card == "rtx-4090" else torch.float16
    with standin.card(card):
        tensors = inputs(dtype, 4, 2, 64, 64)
        output, _ = packed_attention(
            torch.nn.Module(), *tensors, None, lengths=LENGTHS, scaling=64**-0.5, sliding_window=window
        )
        grad = torch.randn(output.shape).to(dtype)
        (output * grad.to(standin.NAME)).sum().backward()
        assert not any("math" in name for name in standin.calls), standin.calls
    mask = mask_of(LENGTHS, (-1,) * len(LENGTHS))
    if window is not None:
        mask &= torch.ones_like(mask).triu(1 - window)
    expected = in_fp64(tensors, mask, grad.transpose(1, 2))
    found = [output.transpose(1, 2), *(tensor.grad for tensor in tensors)]
    assert max(distances(found, expected)) < PRECISION[dtype]


@pytest.mark.parametrize(
    ("card", "dtype"), [("rtx-4090", torch.float32), ("t4", torch.float16), ("rtx-4090", torch.bfloat16)]
)
@pytest.mark.parametrize("is_padded", [True, False])
def test_a_prompt_never_takes_plain_products(card, dtype, is_padded):
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(2, heads, 33, 64).to(dtype) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 33, 33, dtype=torch.bool).tril() if is_padded else None
    plain, _ = padded_rows_attention(module, query, key, value, mask, scaling=64**-0.5)
    with standin.card(card):
        there = [None if tensor is None else tensor.to(standin.NAME) for tensor in (query, key, value, mask)]
        found, _ = padded_rows_attention(module, *there, scaling=64**-0.5)
        if dtype != torch.bfloat16 or is_padded:  # else flash, which transformers leaves to torch
            assert set(standin.calls) == {"efficient"}
    assert torch.allclose(found.cpu().float(), plain.float(), atol=2e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_keeps_its_fp32_sum(rank, dtype):
    left, right = torch.randn(rank, 500).to(dtype), torch.randn(500, 96).to(dtype)
    with standin.card("rtx-4090"):
        found = product_in_fp32(left.to(standin.NAME), right.to(standin.NAME))
    assert found.dtype == torch.float32 and found.device.type == standin.NAME
    assert torch.allclose(found.cpu().double(), left.double() @ right.double(), atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_dequantized_as_on_the_cpu(kind):
    weight = torch.randn(96, 256).bfloat16()
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=True, quant_type=kind
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    with standin.card("rtx-4090"):
        state.to(standin.NAME)
        found = bitsandbytes.functional.dequantize_4bit(packed.to(standin.NAME), state)
    assert found.device.type == standin.NAME and torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw"])
def test_three_updates_are_those_of_the_cpu_to_the_bit_and_large_states_page(optimizer):
    def updated(device: str) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(400, 300).bfloat16().to(device))
        weight.grad_dtype = torch.float32
        made = make_optimizer([("weight", weight)], name=optimizer, learning_rate=1e-2, weight_decay=0.1)
        for step in range(3):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(device)
            made.step()
        return weight.detach().cpu(), made

    expected, _ = updated("cpu")
    with standin.card("rtx-4090"):
        found, made = updated(standin.NAME)
        _, paged = state_bytes(made)
        assert bool(paged) == optimizer.startswith("paged")
        if paged:
            (state,) = made.state.values()
            assert is_paged(state["state1"]) and paged == state["state1"].nbytes + state["state2"].nbytes
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["nf4", "dora"])
def test_a_gradient_is_the_cpus(method):
    """fp32, so that nothing but the order of sums differs."""
    rows, found = tiny_model.random_rows([3, 9, 1, 5]), {}
    for device in ("cpu", standin.NAME):
        with standin.card("rtx-4090"):
            base = load_base(tiny_model.tiny_artefact(), device=device, compute=torch.float32)
            model = attach_adapter(
                base.model, Lora(r=4, lora_alpha=8, use_dora=method == "dora"), factor_dtype=torch.float32
            )
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # the same factors on both devices
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            batches = [batch.to(device) for batch in tiny_model.split_batches(rows, 2)]
            gradients = tiny_model.gradients(model, batches)
            assert {gradient.device.type for gradient in gradients.values()} == {device}
            found[device] = {name: gradient.cpu() for name, gradient in gradients.items()}
    assert tiny_model.relative_difference(found[standin.NAME], found["cpu"]) < 1e-5
