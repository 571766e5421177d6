"""Item 2: the arithmetic that only a card runs, against fp64, and against the CPU's to the bit."""

import math

import torch

from gpu.common import Found, device, distance, each
from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.quantization import BLOCK
from qlora_lite.device.accelerator import card_here
from qlora_lite.device.numerics import exact_sums
from qlora_lite.model.products import product_in_fp32
from qlora_lite.model.tree_attention import NO_PARENT, parts_of, tree_attention
from qlora_lite.training import make_optimizer

PRECISION = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def operators() -> Found:
    """The arithmetic that only a card runs."""
    return each(
        {
            "dequantize": _dequantized,
            "products": _products,
            "optimizers": _optimizers,
            "attention": _attention,
            "lora_product": _lora_products,
        }
    )


def _dequantized() -> Found:
    """NF4 and FP4 with double quantization: the same values as on the CPU."""
    found = {}
    for kind in ("nf4", "fp4"):
        weight = torch.randn(256, 512).bfloat16()
        quantize = bitsandbytes.functional.quantize_4bit
        packed, state = quantize(weight, blocksize=BLOCK, compress_statistics=True, quant_type=kind)
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        state.to(device())
        there = bitsandbytes.functional.dequantize_4bit(packed.to(device()), state)
        found[kind] = {
            "differing_share": (there.cpu() != expected).float().mean().item(),
            "error": distance(there, expected),
        }
        assert found[kind]["error"] < 4e-3, found
    return found


def _products() -> Found:
    """16-bit inputs, fp32 result, at the ranks of adapters."""
    found = {}
    for rank in (4, 8, 16, 32, 64):
        left, right = torch.randn(rank, 2048).bfloat16(), torch.randn(2048, 512).bfloat16()
        there = product_in_fp32(left.to(device()), right.to(device()))
        assert there.dtype == torch.float32
        found[str(rank)] = distance(there, left.double() @ right.double())
        assert found[str(rank)] < 1e-5, found
    return found


def _optimizers() -> Found:
    """Three updates of bf16 weights with an fp32 master, in state that is too small to page."""
    found = {}
    for name in ("paged_adamw_8bit", "paged_adamw_32bit", "adamw"):
        after = {place: _updated(name, place) for place in ("cpu", device())}
        differing = (after["cpu"] != after[device()]).float().mean().item()
        found[name] = {"differing_share": differing, "distance": distance(after[device()], after["cpu"].double())}
        assert found[name]["distance"] < 1e-3, found
    return found


def _updated(name: str, place: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(200, 300, generator=generator).bfloat16().to(place))
    weight.grad_dtype = torch.float32
    optimizer = make_optimizer([("weight", weight)], name=name, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, generator=generator).to(place)
        optimizer.step()
    return weight.detach().cpu()


TREE = (40, 7, 1, 9, 30, 5, 1), (NO_PARENT, 0, 0, 0, NO_PARENT, 4, 4)  # segments of one token among them
ROWS = (33, 1, 64, 129), (NO_PARENT,) * 4


def _attention() -> list[Found]:
    """Forward and backward over a tree and over rows, for every kernel that this card takes, against plain attention in fp64."""
    card, found = card_here(), []
    assert card is not None
    half = torch.bfloat16 if card.has_bf16 else torch.float16
    for dtype in (half, torch.float32):
        for lengths, parents in (TREE, ROWS):
            for heads, key_heads, width in ((8, 2, 64), (4, 4, 128), (4, 2, 256), (4, 2, 60)):
                errors, bounds = _attention_errors(dtype, heads, key_heads, width, lengths, parents)
                wrong = [name for name in errors if not errors[name] <= bounds[name]]
                case = {"dtype": str(dtype), "kernel": card.attention_kernel(dtype, width), "heads": [heads, key_heads]}
                found.append(case | {"width": width, "errors": errors, "bounds": bounds, "wrong": wrong})
    return found


def _attention_errors(
    dtype: torch.dtype, heads: int, key_heads: int, width: int, lengths: tuple[int, ...], parents: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """-> (errors of output and gradients against fp64; what they may be: twice those of plain attention in the same type)."""
    rows = [torch.randn(1, sum(lengths), count, width).to(dtype) for count in (heads, key_heads, key_heads)]
    there = [row.to(device()).transpose(1, 2).requires_grad_() for row in rows]
    with exact_sums():
        output = tree_attention(*there, parts_of(lengths, parents), scaling=width**-0.5)
        grad = torch.randn(output.shape).to(dtype)
        (output * grad.to(device())).sum().backward()
    found = [output, *(tensor.grad for tensor in there)]
    exact, plain = (_plain_attention(rows, grad, _mask(lengths, parents), to) for to in (torch.float64, dtype))
    names = ("output", "q", "k", "v")
    errors = {name: distance(mine, right) for name, mine, right in zip(names, found, exact, strict=True)}
    rounding = {name: distance(rough, right) for name, rough, right in zip(names, plain, exact, strict=True)}
    return errors, {name: max(2 * rounding[name], PRECISION[dtype]) for name in names}


def _plain_attention(
    rows: list[torch.Tensor], grad: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients on the CPU; weights and products are rounded to `dtype`, as a kernel's are."""
    query, key, value = (row.to(dtype).transpose(1, 2).requires_grad_() for row in rows)
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).mT).to(torch.promote_types(dtype, torch.float32)) * query.shape[
        -1
    ] ** -0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).to(dtype)
    output = weights @ value.repeat_interleave(groups, 1)
    (output * grad.to(dtype)).sum().backward()
    return [output.detach(), query.grad, key.grad, value.grad]


def _mask(lengths: tuple[int, ...], parents: tuple[int, ...]) -> torch.Tensor:
    """[T, T]: what each token sees."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for start, length, parent in zip(starts, lengths, parents, strict=True):
        mask[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        while parent != NO_PARENT:
            mask[start : start + length, starts[parent] : starts[parent] + lengths[parent]] = True
            parent = parents[parent]
    return mask


def _lora_products() -> list[Found]:
    """How much of a small change survives the rounding: joined in one product, added in place, and added to a rounded product (peft)."""
    found = []
    tokens, width, rank = 128, 1024, 16
    x, weight, hidden = torch.randn(tokens, width), torch.randn(width, width) * 0.02, torch.randn(tokens, rank)
    x, weight, hidden = (tensor.bfloat16() for tensor in (x, weight, hidden))
    exact = x.double() @ weight.double().T
    for size in (1e-2, 1e-3, 2e-4):
        factor = (torch.randn(width, rank) * size * 0.16).bfloat16()
        change = hidden.double() @ factor.double().T
        x_there, weight_there, hidden_there, factor_there = (
            tensor.to(device()) for tensor in (x, weight, hidden, factor)
        )
        with exact_sums():
            joined = torch.cat([x_there, hidden_there], 1) @ torch.cat([weight_there, factor_there], 1).T
            added = torch.addmm(hidden_there @ factor_there.T, x_there, weight_there.T)
            apart = x_there @ weight_there.T + hidden_there @ factor_there.T
        rounded = exact.bfloat16().double()

        def kept(result: torch.Tensor, change: torch.Tensor = change, rounded: torch.Tensor = rounded) -> float:
            return (((result.cpu().double() - rounded) * change).sum() / change.square().sum()).item()

        found.append(
            {"size": size, "joined": kept(joined), "added_in_place": kept(added), "rounded_first": kept(apart)}
        )
        assert 0.8 < found[-1]["joined"] < 1.2, found[-1]
    return found
