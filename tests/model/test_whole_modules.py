"""lora.modules_to_save: modules trained whole beside the factors, in gradients, files, plain peft and the merge."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_lite.base.artefact import quantize_base
from qlora_lite.errors import ModelError
from qlora_lite.merging import merge
from qlora_lite.merging.write import MergeOptions
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import load_base
from qlora_lite.training.optimizer import make_optimizer
from qlora_lite.training.step import forward_backward
from tests.plain_peft import assert_plain_peft_computes_the_same
from tests.tiny_model import gradients, random_rows, save_tiny_llama, split_batches, tiny_artefact, tiny_base


def model_with(whole=("lm_head", "embed_tokens"), **settings) -> PeftModel:
    return attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8, modules_to_save=whole), **settings)


def trained(num_steps: int = 6) -> PeftModel:
    model = model_with()
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=5e-3, weight_decay=0.0)
    model.train()
    for _ in range(num_steps):
        batches = split_batches(random_rows([4, 3]), 1)
        forward_backward(model, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def test_copies_are_trained_with_fp32_gradients_and_the_base_stays_as_it_is():
    model = model_with()
    found = gradients(model, split_batches(random_rows([3, 5]), 1))
    whole = {name for name in found if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in whole} == {"lm_head", "embed_tokens"}
    assert all(found[name].dtype == torch.float32 and found[name].norm() > 0 for name in whole)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "original_module" in name)


def test_a_name_means_modules_of_that_name_and_no_longer_ones(tmp_path):
    """peft would take "norm" for input_layernorm as well, and a merge would not know these."""
    model = model_with(["norm"])
    whole = {
        name.split(".modules_to_save")[0]
        for name, p in model.named_parameters()
        if p.requires_grad and "lora" not in name
    }
    assert whole == {"base_model.model.model.norm"}
    save_adapter(model, tmp_path / "adapter", base_name="base")
    result = merge(tiny_artefact(), tmp_path / "adapter", tmp_path / "merged", [random_rows([3]).encoded(0)])
    assert result.num_merged >= 1


def test_splitting_a_step_does_not_change_the_heads_gradient():
    rows = random_rows([3, 5, 1, 7])
    one, four = (gradients(model_with(["lm_head"]), split_batches(rows, num)) for num in (1, 4))
    (name,) = [name for name in one if "modules_to_save" in name]
    assert (one[name] - four[name]).norm() < 1e-5 * one[name].norm()


def test_plain_peft_reads_them_and_computes_the_same(tmp_path):
    ids = random_rows([3]).encoded(0).input_ids
    assert_plain_peft_computes_the_same(trained(), tiny_base().model, ids, base=tiny_artefact(), folder=tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= saved.keys()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merge_holds_them_and_is_proved(tmp_path, scale):
    save_adapter(trained(), tmp_path / "adapter", base_name="base")
    rows = random_rows([3, 5, 2])
    result = merge(
        tiny_artefact(),
        tmp_path / "adapter",
        tmp_path / "merged",
        [rows.encoded(i) for i in range(3)],
        options=MergeOptions(scale=scale),
    )
    assert result.adapter_effect > 1 and result.arithmetic_ratio < 0.01
    assert result.num_merged == 14 + 2
    merged, base = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(tiny_artefact() / "model.safetensors"),
    )
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        whole = saved[f"base_model.model.{name}"].float()
        expected = base[name].float().lerp(whole, scale)
        limit = 0 if scale == 1 else expected.abs().max() * 2**-8
        assert (merged[name].float() - expected).abs().max() <= limit


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (["up_proj"], 'modules_to_save: "up_proj" is quantized'),
        (
            ["head"],
            'modules_to_save: "head" matches no module with weights in this model; modules in 16 bits: .*lm_head',
        ),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_by_name(whole, message):
    with pytest.raises(ModelError, match=message):
        model_with(whole)


def test_a_tied_head_is_refused(tmp_path):
    source = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    base = load_base(quantize_base(source, cache=tmp_path), device="cpu").model
    with pytest.raises(ModelError, match="ties its head to its embedding"):
        attach_adapter(base, Lora(r=4, lora_alpha=8, modules_to_save=["lm_head"]))
