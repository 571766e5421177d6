"""Promise 5: evaluating between steps does not change the next gradient.

On CPUs with AVX512-BF16 bitsandbytes would repack 4-bit weights in place when it evaluates. Here every CPU counts as one of
these, and a call of the function that repacks is an error, so the trap would spring anywhere.
"""

import pytest
import torch

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.evaluation.generate import generate_answers
from qlora_lite.evaluation.scores import validation_loss
from qlora_lite.model.adapter import load_adapter, save_adapter
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_model import (
    NUM_LINEAR,
    gradients,
    linear4bit_layers,
    random_rows,
    split_batches,
    tiny_adapted,
    tiny_base,
)


class Repacked(Exception):
    """The trap has sprung."""


@pytest.fixture(autouse=True)
def cpu_with_avx512_bf16(monkeypatch):
    def repack(*args, **kwargs):
        raise Repacked

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)


def evaluate(model):
    rows = random_rows([3, 5])
    prompts = [rows.encoded(i).input_ids for i in range(2)]
    generate_answers(model, make_tokenizer(), prompts, stop_token=2, max_new_tokens=3)
    validation_loss(model, rows, device="cpu", micro_batch_tokens=64)


def dequantized(model):
    return {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in linear4bit_layers(model).items()
    }


def test_evaluating_between_steps_does_not_change_the_next_gradient():
    batches = split_batches(random_rows([1, 9, 4, 30]), 2)
    model = tiny_adapted()
    never_evaluated = gradients(model, batches)
    evaluate(model)
    evaluated = gradients(model, batches)
    for name, gradient in never_evaluated.items():
        assert torch.equal(evaluated[name], gradient), name


def test_evaluating_does_not_change_the_weights_that_a_merge_would_read():
    model = tiny_adapted()
    before = dequantized(model)
    evaluate(model)
    after = dequantized(model)
    assert len(before) == NUM_LINEAR and all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        for layer in linear4bit_layers(model).values()
    )


def test_no_layer_of_a_base_or_an_adapted_or_a_reloaded_model_may_repack(tmp_path):
    model = tiny_adapted()
    save_adapter(model, tmp_path, base_name="tiny")
    for loaded in (tiny_base().model, model, load_adapter(tiny_base().model, tmp_path)):
        layers = linear4bit_layers(loaded)
        assert len(layers) == NUM_LINEAR
        assert all(layer.support_avx512bf16_for_cpu is False for layer in layers.values())


def test_without_the_guard_the_trap_springs():
    """Watches upstream: when this fails, bitsandbytes has changed and `keep_weights_unpacked` may go or must change."""
    model = tiny_base().model
    layer = next(iter(linear4bit_layers(model).values()))
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(Repacked), torch.no_grad():
        layer(torch.zeros(1, 64, dtype=torch.bfloat16))
