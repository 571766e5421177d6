"""Reading adapters: the formula's settings are honoured, everything else is refused by name."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_lite.errors import ModelError
from qlora_lite.merging.lora import change_rows_, rank_and_scaling, read_adapter


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(12, 8, bias=False)
        self.up_proj = torch.nn.Linear(8, 16, bias=False)

    def forward(self, x):
        return self.up_proj(self.q_proj(x))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
    ],
)
def test_the_delta_is_the_one_peft_computes(tmp_path, settings):
    model = get_peft_model(
        Block(),
        LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings),
    )
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert set(adapter.factors) == {"q_proj", "up_proj"}
    for name, factors in adapter.factors.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight("default")
        rows = torch.zeros(factors.shape)
        for start in range(0, factors.shape[0], 3):
            change_rows_(rows[start : start + 3], factors, start=start, scale=0.5)
        torch.testing.assert_close(rows, 0.5 * expected)


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert rank_and_scaling({"r": 16, "lora_alpha": 32}, "m") == (16, 2.0)
    assert rank_and_scaling({"r": 16, "lora_alpha": 32, "use_rslora": True}, "m") == (16, 32 / math.sqrt(16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3'"),
        ({"invented_later": 3}, "invented_later: 3"),
    ],
)
def test_unsupported_settings_are_refused_by_name(make_adapter, settings, message):
    with pytest.raises(ModelError, match=message):
        read_adapter(make_adapter(**settings))


def test_a_dora_adapter_without_its_magnitudes_is_refused(make_adapter):
    with pytest.raises(ModelError, match="lacks DoRA's magnitudes"):
        read_adapter(make_adapter(use_dora=True))


def test_every_problem_of_the_factors_is_named_at_once(make_adapter):
    name = "base_model.model.model.layers.0.up_proj.lora_A.weight"
    folder = make_adapter(rename={name: "base_model.model.lm_head.bias"}, rank_pattern={"layers.1.up_proj": 8})
    with pytest.raises(ModelError) as error:
        read_adapter(folder)
    assert "base_model.model.lm_head.bias: not a LoRA factor" in str(error.value)
    assert "model.layers.0.up_proj: has only one of lora_A and lora_B" in str(error.value)
    assert "model.layers.1.up_proj: lora_A [4, 64], lora_B [48, 4], but r=8 in adapter_config.json" in str(error.value)
