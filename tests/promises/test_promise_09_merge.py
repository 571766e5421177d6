"""Promise 9: merged (fp32) log-probabilities equal the adapter model's within 1% of its effect, also after evaluating.

The reference is independent of the merge: a live model (transformers + bitsandbytes + PEFT), each 4-bit layer replaced
by what bitsandbytes dequantizes it to for bf16 training, run whole in fp32.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora_lite.base.bnb import bitsandbytes, keep_weights_unpacked
from qlora_lite.data.template import Encoded
from qlora_lite.errors import ModelError, ProofFailed
from qlora_lite.merging import merge, proof, prove_merge, write
from qlora_lite.merging.checkpoint import Checkpoint
from qlora_lite.merging.write import MergeOptions
from tests.merged import merge_adapter

VOCAB = 120
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2}


ROWS = [
    Encoded(torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist(), spans)
    for length, spans in [(9, ((5, 9),)), (17, ((16, 17),)), (30, ((3, 6), (21, 30))), (12, ((1, 12),))]
]


@dataclass(frozen=True)
class Folders:
    base: Path
    adapter: Path


def make_folders(root: Path, config=None, *, enlarge=1.0, **lora) -> Folders:
    """A random 4-bit model and an adapter with a clear effect, saved as the artefact and PEFT save them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES))
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= enlarge
    model.save_pretrained(root / "bf16")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        root / "bf16", quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    keep_weights_unpacked(model)
    model.save_pretrained(root / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(root / "adapter", save_embedding_layers=False)
    return Folders(root / "base", root / "adapter")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return make_folders(tmp_path)


def live_base(folder: Path, *, evaluate_first: bool = False) -> torch.nn.Module:
    """The base in fp32, its weights those of a live 4-bit model (which may have evaluated before)."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    keep_weights_unpacked(model)
    if evaluate_first:
        with torch.no_grad():
            model.eval()(torch.tensor([ROWS[0].input_ids]))
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert weight.dtype == torch.bfloat16
            dense.weight.data = weight.float()
            if module.bias is not None:
                dense.bias.data = module.bias.data.float()
            model.set_submodule(name, dense)
    return torch.nn.Module.float(model).eval()  # transformers forbids it on a model that was quantized


def label_log_probs(model: torch.nn.Module) -> torch.Tensor:
    """[N, V] in fp32."""
    with torch.no_grad():
        rows = [model(torch.tensor([row.input_ids])).logits[0, row.predictors] for row in ROWS]
    return torch.cat(rows).log_softmax(-1)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).norm().item()


@pytest.mark.parametrize("evaluate_first", [False, True])
def test_merged_fp32_log_probabilities_equal_the_adapter_models_within_one_percent_of_its_effect(
    folders, tmp_path, evaluate_first
):
    merge_adapter(folders.base, folders.adapter, tmp_path / "merged", options=MergeOptions(dtype="fp32"))
    base = label_log_probs(live_base(folders.base))
    adapter = label_log_probs(
        PeftModel.from_pretrained(live_base(folders.base, evaluate_first=evaluate_first), folders.adapter)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)  # plain transformers
    merged = label_log_probs(model.eval())
    effect = distance(adapter, base)
    assert effect > 1.0
    assert distance(merged, adapter) < 0.01 * effect
    assert distance(merged, adapter) < 1e-4 * effect  # in truth it is rounding of fp32


@pytest.mark.parametrize(
    ("config", "dtype", "rounding"),
    [
        (LlamaConfig(**SIZES), "bf16", "stochastic"),
        (LlamaConfig(**SIZES), "bf16", "nearest"),
        (LlamaConfig(**SIZES, tie_word_embeddings=True), "fp16", "stochastic"),
        (MistralConfig(**SIZES, sliding_window=None), "bf16", "stochastic"),
        (Qwen2Config(**SIZES), "bf16", "stochastic"),
        (Qwen3Config(**SIZES, head_dim=16), "bf16", "stochastic"),
    ],
    ids=["llama", "llama-nearest", "llama-tied-fp16", "mistral", "qwen2", "qwen3"],
)
def test_the_streamed_proof_reports_what_whole_live_models_show(tmp_path, config, dtype, rounding):
    folders = make_folders(tmp_path, config)
    result = merge(
        folders.base, folders.adapter, tmp_path / "merged", ROWS, options=MergeOptions(dtype=dtype, rounding=rounding)
    )
    base = label_log_probs(live_base(folders.base))
    adapter = label_log_probs(PeftModel.from_pretrained(live_base(folders.base), folders.adapter))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stored = label_log_probs(model.float().eval())
    effect = distance(adapter, base)
    assert result.adapter_effect == pytest.approx(effect, rel=1e-4)
    assert result.arithmetic_ratio < 1e-4
    assert result.ratio == pytest.approx(distance(stored, adapter) / effect, rel=1e-2)
    assert result.storage_ratio == pytest.approx(result.ratio, rel=1e-2)
    same = (stored.argmax(-1) == adapter.argmax(-1)).double().mean().item()
    assert result.equal_greedy_share == same
    assert (result.storage_ratio == pytest.approx(result.nearest_ratio)) == (rounding == "nearest")
    assert (result.num_rows, result.num_label_tokens) == (4, 4 + 1 + 3 + 9 + 11)
    assert any("rounding to the nearest bf16" in warning for warning in result.warnings) == (rounding == "nearest")


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}]
)
def test_the_proof_holds_for_every_scaling_that_peft_has(tmp_path, settings):
    folders = make_folders(tmp_path, **settings)
    adapter = label_log_probs(PeftModel.from_pretrained(live_base(folders.base), folders.adapter))
    base = label_log_probs(live_base(folders.base))
    result = merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)
    assert result.adapter_effect == pytest.approx(distance(adapter, base), rel=1e-4)
    assert result.arithmetic_ratio < 1e-4


def test_an_adapted_untied_head_is_merged_and_proved(tmp_path):
    modules = ["q_proj", "lm_head"]
    folders = make_folders(tmp_path, target_modules=modules)
    result = merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)
    adapter = label_log_probs(PeftModel.from_pretrained(live_base(folders.base), folders.adapter))
    base = label_log_probs(live_base(folders.base))
    assert result.num_merged == 3
    assert result.adapter_effect == pytest.approx(distance(adapter, base), rel=1e-4)
    assert result.arithmetic_ratio < 1e-4


def wrong_scaling(real):
    return lambda base, adapter, name, scale: real(base, adapter, name, 2 * scale)


def skipped_module(real):
    def blocks(base, adapter, name, scale):
        is_skipped = name.endswith("layers.1.mlp.up_proj.weight")
        return base.row_blocks(name) if is_skipped else real(base, adapter, name, scale)

    return blocks


@pytest.mark.parametrize("mistake", [wrong_scaling, skipped_module])
def test_a_wrong_merge_fails_the_proof_and_leaves_no_folder(folders, tmp_path, monkeypatch, mistake):
    """The mistake is in the one function that makes merged weights: writer and proof share it, the adapter path does not."""
    wrong = mistake(write.tuned_row_blocks)
    monkeypatch.setattr(write, "tuned_row_blocks", wrong)
    monkeypatch.setattr(proof, "tuned_row_blocks", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProofFailed, match="the merged model is not the adapter model"):
        merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("mistake", [wrong_scaling, skipped_module])
def test_files_that_do_not_hold_the_merge_fail_the_proof_by_name(folders, tmp_path, monkeypatch, mistake):
    """The mistake is only in what was written."""
    monkeypatch.setattr(write, "tuned_row_blocks", mistake(write.tuned_row_blocks))
    with pytest.raises(
        ProofFailed, match=r"model\.layers\.\d\..*_proj\.weight: \d+ of \d+ values .* are not the merge"
    ):
        merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)
    assert not (tmp_path / "merged").exists()


def test_evaluating_a_live_model_changes_nothing_in_a_later_merge(folders, tmp_path):
    merge_adapter(folders.base, folders.adapter, tmp_path / "before")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders.base, device_map="cpu", dtype=torch.bfloat16), folders.adapter
    )
    with torch.no_grad():
        model.eval()(torch.tensor([ROWS[0].input_ids]))
    merge_adapter(folders.base, folders.adapter, tmp_path / "after")
    files = [tmp_path / name / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_that_does_nothing_gives_zero_ratios_and_a_warning(tmp_path):
    folders = make_folders(tmp_path)
    result = merge(folders.base, folders.adapter, tmp_path / "merged", ROWS, options=MergeOptions(scale=0.0))
    assert (result.adapter_effect, result.arithmetic_ratio, result.storage_ratio, result.ratio) == (0.0, 0.0, 0.0, 0.0)
    assert any("changes almost nothing" in warning for warning in result.warnings)


def test_the_proof_reads_the_files_and_not_what_it_thinks_they_hold(folders, tmp_path):
    merge_adapter(folders.base, folders.adapter, tmp_path / "merged")
    assert prove_merge(folders.base, folders.adapter, tmp_path / "merged", ROWS).arithmetic_ratio < 1e-4
    path = tmp_path / "merged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20_001] ^= 0x40  # an exponent bit of one weight
    path.write_bytes(data)
    with pytest.raises(ProofFailed):
        prove_merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)


def test_fp16_that_would_overflow_on_the_rows_is_refused_naming_the_layer(tmp_path):
    folders = make_folders(tmp_path, enlarge=50_000.0)
    with pytest.raises(ProofFailed, match=r"model\.layers\.0\..*above fp16's limit of 65504"):
        merge(folders.base, folders.adapter, tmp_path / "merged", ROWS, options=MergeOptions(dtype="fp16"))
    assert not (tmp_path / "merged").exists()


def test_a_config_of_another_model_is_refused_and_a_merge_without_proof_says_so(folders, tmp_path):
    result = merge(folders.base, folders.adapter, tmp_path / "unproved", None)
    assert result.ratio is None
    assert result.warnings == ("the merge was not proved: no held-out rows were given",)
    config = folders.base / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "gemma2"'))
    with pytest.raises(ModelError, match=r"weights of a gemma2 model are missing, first model\.layers\.0\.p"):
        merge(folders.base, folders.adapter, tmp_path / "merged", ROWS)


def test_the_proof_uses_the_weights_of_bf16_training_not_those_of_an_fp32_forward(folders):
    """bitsandbytes dequantizes to the dtype of the input, so an fp32 forward sees weights between the bf16 grid's."""
    model = AutoModelForCausalLM.from_pretrained(folders.base, device_map="cpu", dtype=torch.bfloat16)
    keep_weights_unpacked(model)
    layer = model.model.layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj.weight"
    seen = torch.cat(list(Checkpoint(folders.base).row_blocks(name)))
    for dtype, same in ((torch.bfloat16, True), (torch.float32, False)):
        layer.compute_dtype = dtype
        with torch.no_grad():
            weight = layer(torch.eye(layer.in_features, dtype=dtype)).T.float()
        assert torch.equal(weight, seen) == same


def test_the_merged_config_is_one_that_transformers_reads_as_plain(folders, tmp_path):
    merge_adapter(folders.base, folders.adapter, tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert getattr(config, "quantization_config", None) is None
    assert config.dtype == torch.bfloat16
