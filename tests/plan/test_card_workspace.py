"""What operators allocate inside themselves on a card: PyTorch's and bitsandbytes' formulas, counted by hand for some shapes."""

import pytest
import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.device.card import card_named
from qlora_lite.plan.card_workspace import num_splits
from qlora_lite.plan.workspace import workspace_of

assert bitsandbytes  # its operators are defined
aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
CARD = card_named("rtx-4090")  # 128 multiprocessors


def counted(operator, *args, card=CARD) -> int:
    return workspace_of(card, num_threads=1)(operator, args, {}, None)


def rows(heads: int, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[1, H, T, d] as a model makes it: a transposed view of [1, T, H, d]."""
    return torch.empty(1, tokens, heads, width, dtype=dtype, device="meta").transpose(1, 2)


@pytest.mark.parametrize(
    ("row_blocks", "sms", "key_blocks", "expected"),
    [
        (300, 256, 40, 1),  # enough rows for every multiprocessor
        (1, 256, 1, 1),
        (32, 256, 2, 2),
        (64, 256, 8, 4),  # 4 x 64 fill 256
        (9, 256, 16, 16),  # most that the keys allow
        (205, 256, 40, 1),  # 80% of 256 are 204.8
    ],
)
def test_keys_are_split_until_the_multiprocessors_are_used(row_blocks, sms, key_blocks, expected):
    assert num_splits(row_blocks, sms, key_blocks) == expected


def test_flash_attention_splits_the_keys_of_a_short_row_and_not_of_a_long_one():
    forward = aten._scaled_dot_product_flash_attention.default
    query, key = rows(8, 512, 128), rows(2, 512, 128)
    # 8 heads x 8 blocks of 64 rows = 64 of 2 x 128; 4 blocks of 128 keys, so 4 splits
    assert counted(forward, query, key, key) == 4 * 4 * 8 * 512 * (128 + 1)
    assert counted(forward, rows(32, 4096, 128), rows(8, 4096, 128), rows(8, 4096, 128)) == 0


def test_one_query_of_grouped_heads_is_a_row_for_each_of_its_group():
    forward = aten._scaled_dot_product_flash_attention.default
    # decoding: 32 heads on 8 of keys are 4 rows of 8 heads: 8 blocks; 1,024 keys in blocks of 128: 8 splits
    assert counted(forward, rows(32, 1, 128), rows(8, 1024, 128), rows(8, 1024, 128)) == 4 * 8 * 8 * 4 * (128 + 1)


@pytest.mark.parametrize(("width", "rounded"), [(64, 64), (80, 96), (128, 128), (160, 192), (256, 256)])
def test_flash_attentions_backward_pass_sums_in_fp32_over_whole_blocks(width, rounded):
    backward = aten._scaled_dot_product_flash_attention_backward.default
    query, key = rows(8, 1000, width), rows(8, 1000, width)
    assert counted(backward, query, query, key, key, query) == 4 * 8 * 1024 * (rounded + 1)
    grouped = rows(2, 1000, width)
    expanded = 2 * 2 * 8 * 1000 * width
    assert counted(backward, query, query, grouped, grouped, query) == 4 * 8 * 1024 * (rounded + 1) + expanded


def test_a_gradient_that_lies_otherwise_is_copied():
    backward = aten._scaled_dot_product_flash_attention_backward.default
    query = rows(4, 128, 64)
    plain = counted(backward, query, query, query, query, query)
    laid_out = query.contiguous()
    assert counted(backward, laid_out, query, query, query, query) == plain + 2 * 4 * 128 * 64


def test_the_efficient_kernel_keeps_blocks_of_the_query_gradient():
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    query = rows(4, 128, 64, torch.float32)
    blocks = 2 * 1 * (4 + 64 * 64)  # 2 x 64 rows, one block of columns, 16 bytes of its own each
    delta, product = 4 * 128, 4 * 128 * 64 + 4 * 128
    assert counted(backward, query, query, query, query, None, query) == 4 * (max(4 * blocks, product) + delta)
    half = rows(4, 128, 64)
    assert counted(backward, half, half, half, half, None, half) == 4 * (4 * blocks + delta)


def test_wide_heads_cost_more_on_cards_with_little_shared_memory():
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    wide = rows(4, 1024, 128)
    small, large = (
        counted(backward, wide, wide, wide, wide, None, wide, card=card_named(n)) for n in ("rtx-4090", "h100")
    )
    assert small > large


@pytest.mark.parametrize(
    ("card", "dtype", "width", "mib"),
    [
        ("h100", torch.bfloat16, 256, 80.1),  # 128 x 128 blocks, dK and dV among them
        ("rtx-4090", torch.bfloat16, 80, 16.1),  # 128 x 64, dK and dV in registers
        ("rtx-4090", torch.bfloat16, 128, 28.1),
        ("gtx-1080-ti", torch.float32, 64, 8.4),  # no sums at all: the product for delta
    ],
)
def test_the_blocks_are_those_of_the_kernel_that_a_card_takes(card, dtype, width, mib):
    """16 heads, 2,048 tokens; counted by hand from the kernels' list."""
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    tensor = rows(16, 2048, width, dtype)
    found = counted(backward, tensor, tensor, tensor, tensor, None, tensor, card=card_named(card))
    assert found / 2**20 == pytest.approx(mib, abs=0.3)


def test_wide_outputs_of_the_efficient_kernel_are_summed_in_fp32():
    forward = aten._scaled_dot_product_efficient_attention.default
    assert counted(forward, *(rows(4, 100, 264) for _ in range(3))) == 4 * 4 * 100 * 264
    assert counted(forward, *(rows(4, 100, 128) for _ in range(3))) == 0
    assert counted(forward, *(rows(4, 100, 264, torch.float32) for _ in range(3))) == 0


def test_a_4_bit_product_of_many_rows_makes_the_whole_weight_first():
    shape, inputs = (4096, 1024), torch.empty(1, 2048, 1024, dtype=torch.bfloat16, device="meta")
    packed, absmax = torch.empty(4096 * 512, 1, dtype=torch.uint8, device="meta"), torch.empty(65536, device="meta")
    product = bnb.gemm_4bit.default
    assert counted(product, inputs, packed, shape, absmax, 64) == 2 * 4096 * 1024 + 8 * 65536
    assert counted(product, inputs[:, :1], packed, shape, absmax, 64) == 0


def test_a_frozen_layer_of_a_rehearsal_is_counted_so():
    """Only some layers have factors: the others go through bitsandbytes' own forward."""
    from qlora_lite.base.known import known_config
    from qlora_lite.plan.rehearsal import MicroBatch, Settings, Stage

    config = known_config("llama-3.2-1b")
    config.num_hidden_layers = 2
    found = Stage(config, Settings(card=CARD, target_modules=("q_proj",))).rehearse(MicroBatch(64))
    assert found.phases["forward"]["workspace"] >= 2 * 8192 * 2048  # gate, up or down, in 16 bits
