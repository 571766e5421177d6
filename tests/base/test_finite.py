"""A base or an adapter with NaN or infinite values is refused before training, by the tensor's name and where it lies."""

import math
import struct
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.base.artefact import quantize_base
from qlora_lite.base.finite import refuse_not_finite
from qlora_lite.base.gguf_folder import convert_gguf
from qlora_lite.base.quantization import Quantization
from qlora_lite.errors import ModelError
from qlora_lite.model.adapter import Lora, attach_adapter, load_adapter, save_adapter
from qlora_lite.model.factors import copy_factors
from qlora_lite.model.load import load_base
from qlora_lite.runs.adapters import open_source, parse_part, parts_of
from tests.hostile.model_readers import READERS
from tests.tiny_model import save_tiny_llama, tiny_base
from tests.tiny_run import run_cli, write_recipe

UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"


def change(folder: Path, name: str, value: float, *, whole: bool = False, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    tensor = tensors[name].clone()
    tensor.view(-1)[slice(None) if whole else min(1, tensor.numel() - 1)] = value
    save_file(tensors | {name: tensor}, folder / file, metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_llama(tmp_path / "base")


@pytest.mark.parametrize("name", [UP, EMBEDDING, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize(("value", "whole"), [(math.nan, False), (math.inf, False), (-math.inf, True)])
def test_a_16_bit_base_is_refused_where_it_is_quantized_and_where_it_is_loaded(base, tmp_path, name, value, whole):
    change(base, name, value, whole=whole)
    first = "[0]" if whole and "norm" in name else "[0, 0]" if whole else "[1]" if "norm" in name else "[0, 1]"
    for read in (lambda: load_base(base, device="cpu"), lambda: quantize_base(base, cache=tmp_path / "cache")):
        with pytest.raises(ModelError) as error:
            read()
        assert str(error.value).startswith(f"{base}: {name} has ") and f"first {value} at {first}" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_training_names_the_tensor_and_neither_rows_nor_the_learning_rate(base, tmp_path):
    change(base, UP, math.nan)
    done = run_cli("train", write_recipe(tmp_path), "--set", f"model.base={base}", "--run-dir", tmp_path / "run")
    assert done.code == 2 and f"{base}: {UP} has 1 of" in done.last_line, done.stderr
    assert "learning" not in done.last_line


@pytest.mark.parametrize(
    ("quantization", "part"),
    [
        (Quantization("nf4"), f"{UP}.nested_absmax"),
        (Quantization("nf4", double_quant=False), f"{UP}.absmax"),
        (Quantization("fp4", double_quant=False), f"{UP}.quant_map"),
        (Quantization("int8"), UP.removesuffix("weight") + "SCB"),
        (Quantization("nf4"), EMBEDDING),
    ],
)
def test_a_quantized_base_is_refused_for_its_scales_too(base, tmp_path, quantization, part):
    artefact = quantize_base(base, cache=tmp_path / "cache", quantization=quantization)
    change(artefact, part, math.inf)
    with pytest.raises(ModelError) as error:
        load_base(artefact, device="cpu")
    assert f"{artefact}: {part} has 1 of" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gguf_is_refused_where_it_is_converted(tmp_path, value):
    reader = next(reader for reader in READERS if reader.name == "gguf")
    (tmp_path / "seed").mkdir()
    reader.write(reader.make(tmp_path / "seed")[0], tmp_path, None)
    path = tmp_path / "tiny.gguf"
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    data, at = bytearray(path.read_bytes()), tensor.data_offset
    data[at + 2 : at + 4] = struct.pack("<e", value)
    path.write_bytes(data)
    with pytest.raises(ModelError, match=rf"tiny\.gguf: blk\.0\.ffn_up\.weight \({UP}\) has 1 of .* at \[0, 1\]"):
        convert_gguf(path, cache=tmp_path / "cache")


@pytest.fixture
def broken_adapter(tmp_path) -> Path:
    save_adapter(attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8)), tmp_path / "adapter", base_name="base")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change(tmp_path / "adapter", name, math.nan, file="adapter_model.safetensors")
    return tmp_path / "adapter"


def test_every_reader_of_an_adapter_refuses_one_that_is_not_finite(broken_adapter):
    readers = {
        "load": lambda: load_adapter(tiny_base().model, broken_adapter),
        "lora.init_from": lambda: copy_factors(
            attach_adapter(tiny_base().model, Lora(r=4, lora_alpha=8)), broken_adapter
        ),
        "rank": lambda: open_source(broken_adapter).read(),
        "mix": lambda: parts_of([parse_part(f"{broken_adapter}:0.5")]),
    }
    for verb, read in readers.items():
        with pytest.raises(ModelError) as error:
            read()
        found = str(error.value).removeprefix("lora.init_from: ")
        assert found.startswith(f"{broken_adapter / 'adapter_model.safetensors'}: base_model.model.model"), verb
        assert "up_proj.lora_B.weight has 1 of 768 values that are not finite (first nan at [0, 1])" in found


def test_finite_values_that_a_type_does_not_hold_are_told_from_damage():
    large = torch.tensor([1.0, 1e6])
    with pytest.raises(ModelError, match="w reaches 1e\\+06, beyond the range of float16"):
        refuse_not_finite(large.half(), "w", where="base", as_read=large)
    for tensor in (large, torch.tensor([]), torch.tensor([3], dtype=torch.uint8), torch.empty(2, device="meta")):
        refuse_not_finite(tensor, "w", where="base")
