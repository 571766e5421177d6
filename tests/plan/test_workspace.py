"""Each row of the table against the allocator."""

import pytest
import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.accelerator import cpu_multiplies_bf16
from qlora_lite.device.card import CPU
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.plan.workspace import workspace_of

THREADS = torch.get_num_threads()
aten, bnb = torch.ops.aten, torch.ops.bitsandbytes


def counted(operator, *args) -> int:
    return workspace_of(CPU, num_threads=THREADS)(operator, args, {}, None)


@pytest.mark.parametrize("num", [4096, 300_000])
@pytest.mark.parametrize(
    ("kind", "operator"),
    [("AdamW8bit", bnb.optimizer_update_8bit_blockwise.default), ("AdamW32bit", bnb.optimizer_update_32bit.default)],
)
def test_adamw_on_the_cpu(kind, operator, num):
    weight = torch.randn(num)
    weight.grad = torch.randn(num)
    optimizer = getattr(bitsandbytes.optim, kind)([weight], lr=1e-4)
    optimizer.step()
    with measure_allocations("cpu") as allocations:
        optimizer.step()
    assert allocations.peak_bytes == pytest.approx(counted(operator, "adam", weight.grad, weight), abs=100)


@pytest.mark.parametrize("length", [60, 200, 800, 2000])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(9, 3, 64), (8, 8, 32)])
def test_attention_on_the_cpu(length, heads, key_heads, width):
    shapes = [(1, h, length, width) for h in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    with measure_allocations("cpu") as forward:
        out, logsumexp = attend(query, key, value, 0.0, True)
    expected = counted(attend.default, query, key, value)
    assert forward.peak_bytes - out.nbytes - logsumexp.nbytes == pytest.approx(expected, abs=100)
    grad = torch.ones_like(out)
    with measure_allocations("cpu") as backward:
        found = torch.autograd.grad(out, (query, key, value), grad)
    inside = backward.peak_bytes - sum(gradient.nbytes for gradient in found)
    expected = counted(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, grad, query, key)
    assert expected * 0.7 <= inside <= expected * 2 + 2**20  # its matrix products pack their inputs too


@pytest.mark.parametrize("shapes", [(200, 1040, 256), (643, 592, 1536), (2048, 1552, 576), (32, 272, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_left_transposed", [False, True])
@pytest.mark.parametrize("is_right_transposed", [False, True])
def test_matrix_products_on_the_cpu(shapes, dtype, is_left_transposed, is_right_transposed):
    n, k, m = shapes
    if n > 1000 and dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        pytest.skip(
            "this processor takes a minute for a product of this size in bf16, which the program does not choose here"
        )
    left = torch.ones(k, n, dtype=dtype).T if is_left_transposed else torch.ones(n, k, dtype=dtype)
    right = torch.ones(m, k, dtype=dtype).T if is_right_transposed else torch.ones(k, m, dtype=dtype)
    left @ right  # what is made once
    with measure_allocations("cpu") as allocations:
        product = left @ right
    inside = allocations.peak_bytes - product.nbytes
    assert inside == pytest.approx(counted(aten.mm.default, left, right), abs=2**16)
    assert counted(aten.addmm.default, left, left, right) == counted(aten.mm.default, left, right)
