"""The quantized base on disk: its bytes, that it is transformers' own format and numbers, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.base.artefact import quantize_base, verify_artefact
from qlora_lite.errors import ModelError
from qlora_lite.files.manifest import sha256_of_file
from qlora_lite.model.load import load_base
from tests.tiny_model import NUM_LINEAR, linear4bit_layers, save_tiny_llama, tiny_artefact, tiny_base, tiny_source

CODE_BYTES = 4 * (16 + 256)  # the two maps; with the offset that the quant state's JSON holds, 1,092
OFFSET_BYTES = 4


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_nf4_takes_exactly_the_bytes_of_the_formula():
    stored, original = tensors_of(tiny_artefact()), tensors_of(tiny_source())
    quantized = [name for name in original if f"{name}.absmax" in stored]
    assert len(quantized) == NUM_LINEAR
    for name in quantized:
        n = original[name].numel()
        parts = {part: tensor.nbytes for part, tensor in stored.items() if part.startswith(name)}
        facts = parts.pop(f"{name}.quant_state.bitsandbytes__nf4")
        assert sum(parts.values()) == n / 2 + n / 64 + 4 * math.ceil(n / 64 / 256) + CODE_BYTES
        assert facts == 256


def test_a_loaded_base_holds_exactly_the_bytes_of_the_formula():
    original = tensors_of(tiny_source())
    base = tiny_base()
    sizes = {name: original[f"{name}.weight"].numel() for name in linear4bit_layers(base.model)}
    assert len(sizes) == NUM_LINEAR
    dense = sum(tensor.nbytes for name, tensor in original.items() if name.removesuffix(".weight") not in sizes)
    rotary = sum(buffer.nbytes for buffer in base.model.buffers())
    assert base.weights_bytes == sum(n // 2 for n in sizes.values()) + dense + rotary
    constants = sum(n // 64 + 4 * math.ceil(n / 64 / 256) + CODE_BYTES + OFFSET_BYTES for n in sizes.values())
    assert base.quant_constants_bytes == constants


def test_everything_but_the_linear_layers_is_stored_as_it_was():
    stored, original = tensors_of(tiny_artefact()), tensors_of(tiny_source())
    dense = [name for name in original if f"{name}.absmax" not in stored]
    assert "lm_head.weight" in dense and "model.embed_tokens.weight" in dense and "model.norm.weight" in dense
    assert all(torch.equal(stored[name], original[name]) for name in dense)


def test_it_equals_what_transformers_itself_quantizes_from_the_same_folder():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_source(), quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_artefact(), device_map="cpu", dtype=torch.bfloat16)
    for ours in (tiny_base().model, plain):  # plain: no help of this package is needed to read the artefact
        layers, expected = linear4bit_layers(ours), linear4bit_layers(theirs)
        assert layers.keys() == expected.keys() and len(layers) == NUM_LINEAR
        for name, layer in layers.items():
            state, their_state = layer.weight.quant_state, expected[name].weight.quant_state
            assert torch.equal(layer.weight.data, expected[name].weight.data), name
            assert torch.equal(state.absmax, their_state.absmax), name
            assert torch.equal(state.state2.absmax, their_state.state2.absmax), name
            assert torch.equal(state.offset, their_state.offset), name
            assert torch.equal(state.code, their_state.code) and torch.equal(state.state2.code, their_state.state2.code)
            assert (state.shape, state.dtype) == (their_state.shape, their_state.dtype)


def test_quantizing_twice_finds_the_first_one_again(tmp_path, monkeypatch):
    calls = []
    first = quantize_base(tiny_source(), cache=tmp_path, progress=lambda done, total: calls.append((done, total)))
    num_tensors = len(tensors_of(tiny_source()))
    assert calls == [(done, num_tensors) for done in range(1, num_tensors + 1)]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("qlora_lite.base.artefact._quantize_tensors", None)
    assert quantize_base(tiny_source(), cache=tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "quantized").iterdir()] == [first.name]


def test_a_changed_source_gets_an_artefact_of_its_own(tmp_path):
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    first = quantize_base(source, cache=tmp_path)
    save_tiny_llama(source, seed=1)
    second = quantize_base(source, cache=tmp_path)
    assert first != second and verify_artefact(first) != verify_artefact(second)


def test_a_half_written_artefact_is_made_anew(tmp_path):
    artefact = quantize_base(tiny_source(), cache=tmp_path)
    good = verify_artefact(artefact)
    (artefact / "manifest.json").unlink()  # it is written last
    (artefact / "model.safetensors").write_bytes(b"half")
    assert quantize_base(tiny_source(), cache=tmp_path) == artefact
    assert verify_artefact(artefact) == good


def test_a_flipped_byte_is_found(tmp_path):
    artefact = Path(shutil.copytree(tiny_artefact(), tmp_path / "artefact"))
    assert verify_artefact(artefact) == sha256_of_file(artefact / "model.safetensors")
    data = bytearray((artefact / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (artefact / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"the quantized base is damaged: .*contents changed.*Remove .* and rerun"):
        verify_artefact(artefact)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "manifest.json"])
def test_a_missing_file_is_found(tmp_path, name):
    artefact = Path(shutil.copytree(tiny_artefact(), tmp_path / "artefact"))
    (artefact / name).unlink()
    with pytest.raises(ModelError, match=f"{name}.*missing"):
        verify_artefact(artefact)


def change_weights(folder: Path, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_missing_is_refused_by_name(tmp_path, name):
    """transformers would fill it in with random numbers."""
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    change_weights(source, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"do not match config.json\n  {name}: not in the files$"):
        quantize_base(source, cache=tmp_path)
    assert not list((tmp_path / "quantized").iterdir())


def test_a_weight_of_another_shape_is_refused_with_both_shapes(tmp_path):
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(source, lambda tensors: tensors.update({name: torch.zeros(64, 64).bfloat16()}))
    with pytest.raises(ModelError, match=rf"{name}: has shape \[64, 64\], config.json says \[192, 64\]"):
        quantize_base(source, cache=tmp_path)


def test_a_head_that_shares_the_embedding_needs_no_weight_of_its_own(tmp_path):
    source = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(source)
    model = load_base(quantize_base(source, cache=tmp_path), device="cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    data = (source / "model.safetensors").read_bytes()
    for size in (len(data) - 1, 100, 0):
        (source / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged safetensors file"):
            quantize_base(source, cache=tmp_path)
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged safetensors file"):
        quantize_base(source, cache=tmp_path)


def test_a_sharded_source_gives_the_same_weights_and_a_shard_outside_it_is_refused(tmp_path):
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, source / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    stored, expected = tensors_of(quantize_base(source, cache=tmp_path)), tensors_of(tiny_artefact())
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    for wrong in (dict.fromkeys(names, "../x.safetensors"), ["part-0.safetensors"]):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ModelError, match="no usable weight_map"):
            quantize_base(source, cache=tmp_path)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_size": "wide"}, {"num_hidden_layers": None}, {"hidden_act": "no"}]
)
def test_a_config_that_describes_no_model_is_refused(tmp_path, changes):
    source = Path(shutil.copytree(tiny_source(), tmp_path / "source"))
    edit_config(source, **changes)
    with pytest.raises(ModelError, match=r"config\.json: does not describe a usable model"):
        quantize_base(source, cache=tmp_path)


def test_a_width_that_the_cpu_computes_wrongly_is_refused_by_name(tmp_path):
    artefact = quantize_base(save_tiny_llama(tmp_path / "odd", hidden_size=96), cache=tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.0\..*: .*width 96.*Use device: cuda"):
        load_base(artefact, device="cpu")


def test_an_artefact_without_a_tokenizer_is_refused(tmp_path):
    artefact = Path(shutil.copytree(tiny_artefact(), tmp_path / "artefact"))
    for path in artefact.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no readable tokenizer"):
        load_base(artefact, device="cpu")


RSS_PROBE = """
import sys
from pathlib import Path
import torch, transformers
from qlora_lite.base.artefact import quantize_base
from transformers import AutoModelForCausalLM, LlamaConfig
AutoModelForCausalLM.from_config  # imported before the first reading

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

quantize_base(Path(sys.argv[1]), cache=Path(sys.argv[3]))  # a tiny one first: whatever is imported late is there now
before, highest = anonymous(), 0
def look(done, total):
    global highest
    highest = max(highest, anonymous())
quantize_base(Path(sys.argv[2]), cache=Path(sys.argv[3]), progress=look)
print(highest - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_16_bit_model_is_never_whole_in_memory(tmp_path):
    source = save_tiny_llama(tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=40)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        largest = max(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    size = (source / "model.safetensors").stat().st_size
    assert size > 250e6
    done = subprocess.run(
        [sys.executable, "-c", RSS_PROBE, tiny_source(), source, tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size / 4, f"{largest} weights in the largest tensor"
