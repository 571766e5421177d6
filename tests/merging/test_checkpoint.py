"""Row blocks against bitsandbytes' own whole-tensor dequantization and against arithmetic."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.base.bnb import bitsandbytes
from qlora_lite.errors import ModelError
from qlora_lite.merging import checkpoint
from qlora_lite.merging.checkpoint import Checkpoint, row_ranges

functional = bitsandbytes.functional


def folder_with(tmp_path, shape, *, double_quant=True, blocksize=64):
    weight = (torch.randn(shape) * 0.05).bfloat16()
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
    )
    parts = {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"w.weight": packed, **parts}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return packed, state


def by_arithmetic(packed, state):
    """code[4 bits] * absmax of each 64, through the flattened tensor, rounded to bf16."""
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    num = state.shape.numel()
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:num].long()
    return (state.code[codes] * absmax.repeat_interleave(state.blocksize)[:num]).view(state.shape).bfloat16()


@pytest.mark.parametrize("shape", [(576, 576), (70, 1536), (37, 96), (50, 40), (33, 7), (3, 130), (200, 160)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_row_blocks_equal_the_dequantized_whole_to_the_bit(tmp_path, monkeypatch, shape, double_quant):
    monkeypatch.setattr(checkpoint, "ROW_BLOCK_ELEMENTS", 1)  # as small as the quantization blocks allow
    monkeypatch.setattr(checkpoint, "_LARGEST_QUANT_BLOCK", 64)
    packed, state = folder_with(tmp_path, shape, double_quant=double_quant)
    base = Checkpoint(tmp_path)
    blocks = list(base.row_blocks("w.weight"))
    assert all(block.dtype == torch.float32 for block in blocks)
    assert len(blocks) > 1 or shape[0] * shape[1] < 2 * 64 * shape[1]
    whole = torch.cat(blocks)
    assert torch.equal(whole.bfloat16(), by_arithmetic(packed, state))
    assert torch.equal(whole, whole.bfloat16().float())  # on the grid training computes with
    if not base.kernel_misreads("w.weight"):
        assert torch.equal(whole.bfloat16(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(37, 96), (64, 160), (64, 576), (33, 7), (50, 40)])
def test_a_kernel_that_misreads_a_width_is_noticed(tmp_path, shape):
    """bitsandbytes 0.50 on AVX512 misreads widths of 32 beyond a multiple of 64; when this machine does, we say so."""
    packed, state = folder_with(tmp_path, shape)
    right = torch.equal(functional.dequantize_4bit(packed, state), by_arithmetic(packed, state))
    assert Checkpoint(tmp_path).kernel_misreads("w.weight") == (not right)


def test_other_block_sizes_are_read_too(tmp_path):
    packed, state = folder_with(tmp_path, (300, 320), blocksize=256)
    assert torch.equal(
        torch.cat(list(Checkpoint(tmp_path).row_blocks("w.weight"))).bfloat16(), by_arithmetic(packed, state)
    )


def test_row_blocks_do_not_depend_on_the_size_of_the_tensor_behind_them():
    assert list(row_ranges(0, 64)) == []
    ranges = list(row_ranges(30_000, 576))
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert ranges[-1][1] == 30_000
    assert all((stop - start) * 576 % 4096 == 0 for start, stop in ranges[:-1])


def test_names_are_those_of_the_model_and_values_of_plain_tensors_are_theirs(base_dir):
    base = Checkpoint(base_dir)
    assert set(base.names) == {
        *("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.up_proj.weight"),
        *("model.layers.0.down_proj.weight", "model.layers.1.up_proj.weight"),
    }
    assert base.shape("model.layers.0.up_proj.weight") == (33, 40)
    stored = load_file(base_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(torch.cat(list(base.row_blocks("model.embed_tokens.weight"))), stored.float())


def test_missing_damaged_and_otherwise_quantized_folders_are_refused_by_name(base_dir):
    (base_dir / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged safetensors file"):
        Checkpoint(base_dir)
    (base_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged safetensors file \(no such file"):
        Checkpoint(base_dir)
    (base_dir / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantized with gptq"):
        Checkpoint(base_dir)
