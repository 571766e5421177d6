"""Examples packed into one row are computed as if each were alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qlora_lite.data.batches import pack_batch
from qlora_lite.memory.ledger import Ledger
from qlora_lite.model import attention
from qlora_lite.model.attention import PACKED, PADDED, attention_for_generation, packed_attention
from qlora_lite.model.forward import causal_lm, predicting_states
from tests.tiny_model import random_rows, split_batches, tiny_adapted

LABELS = (1, 12, 3, 7)


def states(model, batch):
    with torch.no_grad():
        return predicting_states(
            model,
            input_ids_1T=batch.input_ids_1T,
            position_ids_1T=batch.position_ids_1T,
            lengths=batch.lengths,
            parents=batch.parents,
            predictor_N=batch.predictor_N,
        )


@pytest.fixture(scope="module")
def model():
    return tiny_adapted(compute=torch.float32, factors=torch.float32)


def test_packed_attention_is_causal_attention_within_each_example():
    lengths, heads, kv_heads, width = (3, 1, 5), 4, 2, 8
    query = torch.randn(1, heads, sum(lengths), width)
    key, value = torch.randn(2, 1, kv_heads, sum(lengths), width)
    output, weights = packed_attention(None, query, key, value, None, lengths=lengths, scaling=0.3)
    example = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask_TT = (example[:, None] == example) & torch.ones(9, 9).tril().bool()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask_TT, scale=0.3, enable_gqa=True)
    assert weights is None and output.shape == (1, 9, heads, width)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 3, 16])
def test_windows_and_soft_caps_are_computed_in_blocks_as_on_the_whole(monkeypatch, window, softcap):
    """Against the dense formula: scores, cap, mask of the window, softmax; examples shorter and longer than window and block."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    lengths, heads, kv_heads, width = (2, 40, 17), 4, 2, 8
    query = torch.randn(1, heads, sum(lengths), width)
    key, value = torch.randn(2, 1, kv_heads, sum(lengths), width)
    found, _ = packed_attention(
        None, query, key, value, None, lengths=lengths, scaling=1.5, sliding_window=window, softcap=softcap
    )
    example_T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    place_T = torch.arange(sum(lengths))
    distance_TT = place_T[:, None] - place_T
    visible_TT = (example_T[:, None] == example_T) & (distance_TT >= 0)
    if window is not None:
        visible_TT &= distance_TT < window
    scores = 1.5 * query @ key.repeat_interleave(2, dim=1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible_TT, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_capped_scores_are_kept_for_one_block_at_a_time_and_the_gradient_is_the_same(monkeypatch):
    """Twice the length takes about twice the memory above what goes in and comes out, not four times."""
    peaks, gradients = {}, {}
    for length, block in ((256, 64), (512, 64), (512, 512)):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        torch.manual_seed(0)
        qkv = torch.randn(3, 1, 4, length, 8, requires_grad=True)
        ledger = Ledger()
        with ledger:
            output, _ = packed_attention(None, *qkv, None, lengths=(length,), scaling=1.0, softcap=5.0)
            output.square().sum().backward()
        peaks[length, block], gradients[length, block] = ledger.peak_bytes, qkv.grad
    assert peaks[512, 64] < 2.2 * peaks[256, 64] and peaks[512, 64] < 0.5 * peaks[512, 512]
    torch.testing.assert_close(gradients[512, 64], gradients[512, 512], rtol=1e-4, atol=1e-5)


def test_a_packed_row_equals_its_examples_alone(model):
    rows = random_rows(LABELS)
    (packed,) = split_batches(rows, 1)
    alone = torch.cat([states(model, batch) for batch in split_batches(rows, len(LABELS))])
    torch.testing.assert_close(states(model, packed), alone, rtol=1e-5, atol=1e-5)


def test_a_packed_row_equals_what_plain_transformers_computes(model):
    rows = random_rows(LABELS)
    (packed,) = split_batches(rows, 1)
    base = causal_lm(model)
    with torch.no_grad(), attention_for_generation(base):
        plain = [
            base.get_decoder()(torch.tensor([rows.encoded(i).input_ids])).last_hidden_state[
                0, rows.encoded(i).predictors
            ]
            for i in range(len(rows))
        ]
    torch.testing.assert_close(states(model, packed), torch.cat(plain), rtol=1e-4, atol=1e-4)


def test_tokens_do_not_see_other_examples_of_their_row(model):
    rows, others = random_rows(LABELS), random_rows(LABELS, seed=9, prompt=(25, 25))
    first, last = rows.encoded(0), rows.encoded(3)
    one = states(model, pack_batch([first, rows.encoded(1), last], range(3)))
    two = states(model, pack_batch([first, others.encoded(1), last], range(3)))
    num_first, num_last = first.num_label_tokens, last.num_label_tokens
    torch.testing.assert_close(one[:num_first], two[:num_first], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[-num_last:], two[-num_last:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[num_first:-num_last], two[num_first:-num_last], atol=0.1)


def test_attention_for_generation_switches_and_comes_back_also_after_an_error(model):
    base = causal_lm(model)
    with pytest.raises(ZeroDivisionError), attention_for_generation(base):
        assert base.config._attn_implementation == PADDED
        raise ZeroDivisionError
    assert base.config._attn_implementation == PACKED
