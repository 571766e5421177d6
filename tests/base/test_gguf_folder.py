"""The folder made from a GGUF holds what transformers' own dequantizing load holds."""

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_lite.base.gguf_folder import _in_hf_order, convert_gguf
from qlora_lite.errors import ModelError
from qlora_lite.files.manifest import verify_manifest
from tests.tiny_model import SIZES


def write_gguf(path: Path, *, architecture: str = "llama", tensor: str = "token_embd.weight") -> Path:
    """A file with a header and one tensor: enough to be refused."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(tensor, torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "gemma.gguf", architecture="gemma3")
    with pytest.raises(ModelError, match="GGUF architecture 'gemma3' is not supported yet; supported: llama"):
        convert_gguf(path, cache=tmp_path)
    assert not list((tmp_path / "converted").iterdir())


def test_a_gguf_without_a_config_and_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"x\.gguf: not a readable GGUF file"):
        convert_gguf(write_gguf(tmp_path / "x.gguf"), cache=tmp_path)


def test_query_and_key_rows_come_back_from_llama_cpps_order():
    """llama.cpp stores [heads, 2, d/2] rows as [heads, d/2, 2] (convert_hf_to_gguf.py, LlamaModel.permute)."""
    config = AutoConfig.for_model("llama", **SIZES)
    for name, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        weight = torch.randn(heads * 16, 64)
        theirs = weight.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(weight.shape)
        assert not torch.equal(theirs, weight)
        full_name = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(_in_hf_order(full_name, theirs.numpy(), config), weight)
    value = torch.randn(32, 64)
    assert torch.equal(_in_hf_order("model.layers.0.self_attn.v_proj.weight", value.numpy(), config), value)


@pytest.mark.slow
def test_a_converted_gguf_equals_transformers_own_dequantizing_load_and_is_found_again(
    small_gguf, tmp_path, monkeypatch
):
    folder = convert_gguf(small_gguf, cache=tmp_path)
    assert verify_manifest(folder) == []
    ours = load_file(folder / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(
        small_gguf.parent,
        gguf_file=small_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    expected = theirs.state_dict()
    assert expected["lm_head.weight"].data_ptr() == expected["model.embed_tokens.weight"].data_ptr()
    assert ours.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    config = AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16
    changed = {"architectures", "dtype", "_name_or_path", "quantization_config", "transformers_version"}
    for key, value in theirs.config.to_dict().items():
        assert key in changed or config.to_dict()[key] == value, key
    text = "<|im_start|>user\nWhat is the króna?<|im_end|>\n"
    tokenizer = AutoTokenizer.from_pretrained(small_gguf.parent, gguf_file=small_gguf.name)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    monkeypatch.setattr("qlora_lite.base.gguf_folder._convert", None)
    assert convert_gguf(small_gguf, cache=tmp_path) == folder


@pytest.mark.slow
def test_a_gguf_that_was_cut_off_is_refused(small_gguf, tmp_path):
    path = tmp_path / "cut.gguf"
    for size in (small_gguf.stat().st_size - 1000, 3_000_000, 100_000):
        shutil.copyfile(small_gguf, path)
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(ModelError, match=r"cut\.gguf: not a readable GGUF file"):
            convert_gguf(path, cache=tmp_path)
