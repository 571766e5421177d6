"""Every way to store a weight: sizes by arithmetic, values against bitsandbytes, and a base that trains, merges and is proved."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lite.base.artefact import quantize_base, verify_artefact
from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.base.quantization import Quantization, parts_of, stored_quantization
from qlora_lite.errors import ModelError
from qlora_lite.merging import merge
from qlora_lite.merging.checkpoint import open_checkpoint
from qlora_lite.model.adapter import Lora, attach_adapter, save_adapter
from qlora_lite.model.load import load_base
from tests.tiny_model import gradients, move_factors, random_rows, split_batches, tiny_source

EVERY = [Quantization("nf4"), Quantization("nf4", False), Quantization("fp4"), Quantization("fp4", False)]
EVERY += [Quantization("int8", False)]
every_quantization = pytest.mark.parametrize("quantization", EVERY, ids=str)


@every_quantization
def test_sizes_are_known_before_a_weight_is_read(quantization):
    weight = torch.randn(48, 192).bfloat16()
    parts, specs = quantization.quantize("m.weight", weight), quantization.specs("m.weight", (48, 192))
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert parts_of(parts) == {
        "m.weight": sorted(parts.keys() - {"m.weight"}, key=list(parts_of(parts)["m.weight"]).index)
    }


def test_bits_a_weight_are_those_of_the_paper():
    n = 64 * 256 * 16
    stored = {q: sum(s.num_bytes for s in q.specs("m.weight", (256, n // 256)).values()) for q in EVERY}
    facts = 256 + 4 * 16
    assert stored[EVERY[0]] == n / 2 + n / 64 + 4 * math.ceil(n / 64 / 256) + facts + 4 * 256
    assert stored[EVERY[1]] == n / 2 + 4 * n / 64 + facts
    assert stored[EVERY[-1]] == n + 4 * 256 + 1


@every_quantization
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_merge_reads_what_training_computes_with(quantization, compute, tmp_path):
    """A layer with factors that are still zero, applied to the identity, gives the weight that the checkpoint reader gives."""
    folder = quantize_base(tiny_source(), cache=tmp_path, quantization=quantization)
    model = attach_adapter(load_base(folder, device="cpu", compute=compute).model, Lora(r=4, lora_alpha=8)).train()
    files = open_checkpoint(folder, compute_dtype=compute)
    name = "model.layers.1.mlp.down_proj"
    layer, eye = model.get_base_model().get_submodule(name), torch.eye(192, dtype=compute)
    expected = torch.cat(list(files.row_blocks(f"{name}.weight")))
    assert torch.equal(expected, layer(eye[None])[0].T.float().detach())
    with model.disable_adapter():
        assert torch.equal(expected, layer(eye.requires_grad_()[None])[0].T.float().detach())


@every_quantization
def test_a_base_of_every_kind_has_gradients_and_a_proved_merge(quantization, tmp_path):
    folder = quantize_base(tiny_source(), cache=tmp_path, quantization=quantization)
    model = attach_adapter(load_base(folder, device="cpu").model, Lora(r=4, lora_alpha=8))
    move_factors(model)
    rows = random_rows([3, 5, 2])
    assert all(gradient.norm() > 0 for gradient in gradients(model, split_batches(rows, 1)).values())
    save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    result = merge(folder, tmp_path / "adapter", tmp_path / "merged", [rows.encoded(i) for i in range(3)])
    assert result.adapter_effect > 0.1 and result.arithmetic_ratio < 0.01


@every_quantization
def test_transformers_reads_every_kind(quantization, tmp_path):
    folder = quantize_base(tiny_source(), cache=tmp_path, quantization=quantization)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), device_map="cpu", local_files_only=True)
    ours = load_base(folder, device="cpu").model
    assert stored_quantization(json.loads((folder / "config.json").read_text()), folder) == quantization
    for name, weight in ours.state_dict().items():
        if name.endswith("proj.weight"):
            assert torch.equal(weight, theirs.state_dict()[name])


@every_quantization
def test_a_folder_that_is_quantized_already_is_used_as_it_is(quantization, tmp_path):
    folder = quantize_base(tiny_source(), cache=tmp_path / "first", quantization=quantization)
    given = tmp_path / "given"
    shutil.copytree(folder, given)
    (given / "manifest.json").unlink()
    again = quantize_base(given, cache=tmp_path / "second", quantization=quantization)
    assert again != given and verify_artefact(again) == verify_artefact(folder)
    other = Quantization("nf4") if quantization.kind != "nf4" else Quantization("fp4")
    with pytest.raises(ModelError, match=r"A quantized base is used unchanged: use --set model\.quantization="):
        quantize_base(given, cache=tmp_path / "third", quantization=other)


def test_what_bitsandbytes_saves_itself_is_used_as_it_is(tmp_path):
    """A folder made by transformers alone, single quantization, its own shard and index."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    theirs = AutoModelForCausalLM.from_pretrained(str(tiny_source()), quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "given")
    for path in tiny_source().glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "given" / path.name)
    folder = quantize_base(tmp_path / "given", cache=tmp_path / "cache", quantization=Quantization("fp4", False))
    layers = [m for m in load_base(folder, device="cpu").model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"fp4"}


def test_other_quantizers_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="quantized with gptq"):
        stored_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}}, tmp_path)
