"""lora.target_modules and lora.modules_to_save: planned and trained, or refused by check, plan and train in the same words."""

import pytest
import torch
from transformers import LlamaConfig

from qlora_lite.device.card import COMMON_CARD, CPU
from qlora_lite.errors import ModelError
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import load_base
from qlora_lite.plan import MicroBatch, Settings, Stage
from qlora_lite.plan.merging import Merging, merge_peak_host_bytes, proof_peak_host_bytes
from qlora_lite.plan.rehearsal import Body, running
from tests.tiny_model import SIZES, gradients, random_rows, save_tiny_llama, split_batches
from tests.tiny_run import run_cli, write_recipe

CONFIG = LlamaConfig(vocab_size=300, **SIZES | {"num_hidden_layers": 5})
UNUSUAL = [
    ("lm_head",),
    ("layers.4.mlp.down_proj",),  # the last layer's last: nothing before it has a gradient
    ("model.layers.0.self_attn.q_proj", "lm_head"),
]


@pytest.mark.parametrize("targets", UNUSUAL)
@pytest.mark.parametrize("card", [CPU, COMMON_CARD])
def test_any_set_of_linear_layers_is_rehearsed_with_all_that_it_trains(targets, card):
    settings = Settings(card=card, r=4, target_modules=targets)
    found = Stage(CONFIG, settings).rehearse(MicroBatch(32, 2))
    layers = [layer for layer in dict(Body(CONFIG, settings).model.named_modules()) if layer.endswith("lora_A.default")]
    assert len(layers) == len(targets)
    sizes = {"lm_head": 64 + 300, "down_proj": 192 + 64, "q_proj": 64 + 64}
    assert found.num_trained == 4 * sum(sizes[target.rpartition(".")[2]] for target in targets)
    assert found.peak_bytes > 0 and ("backward" in found.phases) == (targets != ("lm_head",))


@pytest.mark.parametrize("targets", UNUSUAL)
def test_a_merge_of_any_set_of_linear_layers_is_planned(targets):
    merging = Merging(Settings(card=CPU, r=4, target_modules=targets))
    assert merge_peak_host_bytes(CONFIG, merging) > 0
    assert proof_peak_host_bytes(CONFIG, merging, [(20, 5)]) > 0


def test_the_head_alone_is_trained_and_merged_with_proof(tmp_path):
    from qlora_lite.merging import merge

    base = save_tiny_llama(tmp_path / "base")
    model = attach_adapter(load_base(base, device="cpu").model, Lora(r=4, lora_alpha=8, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    rows = random_rows([3, 6])
    found = gradients(model, split_batches(rows, 1))
    assert len(found) == 2 and all(gradient.any() for gradient in found.values())
    save_adapter(model, tmp_path / "adapter", base_name="base")
    result = merge(base, tmp_path / "adapter", tmp_path / "merged", [rows.encoded(0)])
    assert result.num_merged == 1 and result.adapter_effect > 0 and result.arithmetic_ratio < 0.01


REFUSED = {
    'lora.target_modules=["nothing"]': 'lora.target_modules: "nothing" is not a linear layer of this model',
    'lora.target_modules=["q_proj","v_prj"]': '"v_prj" is not a linear layer',
    'lora.target_modules=["embed_tokens"]': "(embed_tokens is of type Embedding)",
    'lora.target_modules=["norm"]': "(norm is of type LlamaRMSNorm)",
    'lora.target_modules=["self_attn"]': "(self_attn is of type LlamaAttention)",
    'lora.target_modules=[".*_proj"]': "not patterns",
    'lora.target_modules=["layers.7.mlp.down_proj"]': '"layers.7.mlp.down_proj" is not a linear layer',
    'lora.modules_to_save=["norm","heads"]': '"heads" matches no module with weights',
    'lora.modules_to_save=["q_proj"]': '"q_proj" is quantized',
}


@pytest.mark.parametrize("setting", REFUSED)
def test_check_refuses_names_that_mean_nothing_in_the_model(tmp_path, setting):
    done = run_cli("check", write_recipe(tmp_path), "--set", setting)
    assert done.code == 2 and REFUSED[setting] in done.stderr, done.stderr


def test_check_plan_and_train_refuse_in_the_same_words(tmp_path):
    recipe, setting = write_recipe(tmp_path), 'lora.target_modules=["q_proj","nothing"]'
    verbs = [["check", recipe], ["plan", recipe], ["train", recipe, "--run-dir", tmp_path / "run"]]
    ends = [run_cli(*verb, "--set", setting) for verb in verbs]
    assert [end.code for end in ends] == [2, 2, 2]
    assert len({end.last_line for end in ends}) == 1 and not (tmp_path / "run").exists()


def test_a_module_that_two_settings_name_is_refused(tmp_path):
    settings = ['lora.target_modules=["q_proj","lm_head"]', 'lora.modules_to_save=["lm_head"]']
    done = run_cli("check", write_recipe(tmp_path), "--set", settings[0], "--set", settings[1])
    assert done.code == 2 and "lora.modules_to_save: lm_head is also in lora.target_modules" in done.stderr


def test_a_tied_head_is_refused_by_name():
    tied = LlamaConfig(vocab_size=300, **SIZES, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"ties lm_head to its embedding \(one weight\)"):
        Stage(tied, Settings(card=CPU, target_modules=("lm_head",)))


def test_a_bug_of_ours_in_a_rehearsal_is_not_called_a_fault_of_the_config(monkeypatch):
    stage = Stage(CONFIG, Settings(card=CPU, r=4))
    with pytest.raises(AssertionError), running(CONFIG):
        MicroBatch(10, 1, trunk=20)
    monkeypatch.setattr("qlora_lite.plan.rehearsal.num_labels", lambda micro_batch: -10)
    with pytest.raises(RuntimeError, match="negative dimension"):
        stage.rehearse(MicroBatch(32, 2))


def test_a_model_that_does_not_run_is_a_fault_of_the_config(monkeypatch):
    stage = Stage(CONFIG, Settings(card=CPU, r=4))
    for scene in stage._scenes:
        scene.model.get_base_model().model.rotary_emb.inv_freq = torch.empty(3, device="meta")
    with pytest.raises(ModelError, match="a model with these values does not run"):
        stage.rehearse(MicroBatch(32, 2))
