"""The merged folder: values by arithmetic, files complete, reproducible, small in memory, nothing left on failure."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.errors import ModelError, UserError
from qlora_lite.merging.checkpoint import Checkpoint
from qlora_lite.merging.lora import read_adapter
from qlora_lite.merging.write import MergeOptions
from tests.merged import merge_adapter


def load_all(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def expected_fp32(base_dir, adapter_dir, scale=1.0):
    base, adapter = Checkpoint(base_dir), read_adapter(adapter_dir)
    values = {name: torch.cat(list(base.row_blocks(name))).view(base.shape(name)) for name in base.names}
    for module, factors in adapter.factors.items():
        values[f"{module}.weight"] += scale * factors.scaling * (factors.b_OR.float() @ factors.a_RI.float())
    return values


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fp32_holds_base_plus_scaled_product(base_dir, make_adapter, tmp_path, scale):
    result = merge_adapter(base_dir, make_adapter(), tmp_path / "out", options=MergeOptions(dtype="fp32", scale=scale))
    merged, expected = load_all(tmp_path / "out"), expected_fp32(base_dir, tmp_path / "adapter-0", scale)
    assert merged.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(merged[name], values, rtol=1e-6, atol=1e-7)
    assert (result.num_merged, result.num_tensors) == (3, 5)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_nearest_rounds_to_nearest_and_untouched_tensors_are_copied_exactly(
    base_dir, make_adapter, tmp_path, dtype, torch_dtype
):
    shapes = {"model.layers.0.down_proj": (64, 576)}
    adapter_dir = make_adapter(shapes=shapes)
    merge_adapter(base_dir, adapter_dir, tmp_path / "near", options=MergeOptions(dtype=dtype, rounding="nearest"))
    merge_adapter(base_dir, adapter_dir, tmp_path / "stochastic", options=MergeOptions(dtype=dtype))
    merge_adapter(base_dir, adapter_dir, tmp_path / "fp32", options=MergeOptions(dtype="fp32"))
    near, stochastic, fp32 = (load_all(tmp_path / name) for name in ("near", "stochastic", "fp32"))
    for name, values in fp32.items():
        assert near[name].dtype == torch_dtype
        assert torch.equal(near[name], values.to(torch_dtype))
        assert torch.equal(stochastic[name], near[name]) == (name != "model.layers.0.down_proj.weight")


def test_same_inputs_and_seed_give_the_same_values_whatever_the_shards(base_dir, make_adapter, tmp_path):
    adapter_dir = make_adapter()
    merge_adapter(base_dir, adapter_dir, tmp_path / "a")
    merge_adapter(base_dir, adapter_dir, tmp_path / "b")
    merge_adapter(base_dir, adapter_dir, tmp_path / "shards", options=MergeOptions(max_shard_bytes=10_000))
    merge_adapter(base_dir, adapter_dir, tmp_path / "other", options=MergeOptions(seed=1))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    a, shards, other = (load_all(tmp_path / name) for name in ("a", "shards", "other"))
    assert all(torch.equal(a[name], shards[name]) for name in a)
    assert not all(torch.equal(a[name], other[name]) for name in a)


def test_the_folder_is_an_ordinary_16_bit_model(base_dir, make_adapter, tmp_path):
    merge_adapter(base_dir, make_adapter(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "tie_word_embeddings": True, "dtype": "bfloat16"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert "lm_head.weight" not in load_all(tmp_path / "out")  # tied
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "base").st_mode


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.layers.7.up_proj": (33, 40)}, "model.layers.7.up_proj: .* has no model.layers.7.up_proj.weight"),
        ({"model.layers.0.up_proj": (33, 48)}, r"B @ A is \[33, 48\], model.layers.0.up_proj.weight is \[33, 40\]"),
        ({"lm_head": (50, 64)}, "lm_head: .* ties its head to its embedding"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name_and_leaves_nothing(
    base_dir, make_adapter, tmp_path, shapes, message
):
    adapter_dir = make_adapter(shapes=shapes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=message):
        merge_adapter(base_dir, adapter_dir, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(base_dir, make_adapter, tmp_path):
    adapter_dir = make_adapter()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        merge_adapter(base_dir, adapter_dir, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    merge_adapter(base_dir, adapter_dir, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_values_beyond_fp16_are_refused_with_their_count(base_dir, make_adapter, tmp_path):
    adapter_dir = make_adapter(lora_alpha=4e7)
    with pytest.raises(ModelError, match=r"\d+ values are not finite in fp16; try --set merge.dtype=bf16"):
        merge_adapter(base_dir, adapter_dir, tmp_path / "out", options=MergeOptions(dtype="fp16"))
    assert not (tmp_path / "out").exists()
    merge_adapter(base_dir, adapter_dir, tmp_path / "out", options=MergeOptions(dtype="bf16"))


def test_an_unknown_option_is_named_with_what_is_allowed(base_dir, make_adapter, tmp_path):
    with pytest.raises(UserError, match=r"merge\.rounding: expected one of stochastic, nearest, got 'up'"):
        merge_adapter(base_dir, make_adapter(), tmp_path / "out", options=MergeOptions(rounding="up"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_takes_less_than_twice_the_largest_tensor_and_500_mib(tmp_path):
    """One weight of 512 MiB in fp32, measured in a process of its own, above what the imports take."""
    program = textwrap.dedent("""
        import json, sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from qlora_lite.merging.write import MergeOptions, write_merged
        from qlora_lite.base.bnb import bitsandbytes
        from qlora_lite.files.safetensors_writer import ShardedWriter, TensorSpec

        root = Path(sys.argv[1])
        rows, width, r = 16384, 8192, 16
        _, state = bitsandbytes.functional.quantize_4bit(torch.randn(256, 64), quant_type="nf4", compress_statistics=True)
        parts = {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        meta = json.loads(bytes(parts["w.weight.quant_state.bitsandbytes__nf4"].tolist()))
        meta["shape"] = [rows, width]
        meta["dtype"] = "bfloat16"
        bits = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        parts["w.weight.quant_state.bitsandbytes__nf4"] = bits
        num_blocks = rows * width // 64
        big = {"w.weight": rows * width // 2, "w.weight.absmax": num_blocks}
        parts["w.weight.nested_absmax"] = parts["w.weight.nested_absmax"][:1].repeat(num_blocks // 256)
        specs = {name: TensorSpec((size, 1)[: 2 if name == "w.weight" else 1], torch.uint8) for name, size in big.items()}
        specs |= {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in parts.items() if name not in specs}
        (root / "base").mkdir(), (root / "adapter").mkdir(), (root / "out").mkdir()
        chunk = torch.randint(0, 256, (2**20,), dtype=torch.uint8)
        with ShardedWriter(root / "base", specs) as writer:
            for name in specs:
                blocks = [chunk] * (big[name] // 2**20) if name in big else [parts[name]]
                writer.write(name, blocks)
        quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (root / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        factors = {"A": torch.randn(r, width), "B": torch.randn(rows, r) * 1e-3}
        factors = {f"base_model.model.w.lora_{key}.weight": value for key, value in factors.items()}
        save_file(factors, root / "adapter" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": r, "lora_alpha": 32}
        (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        del factors, parts
        print(write_merged(root / "base", root / "adapter", root / "out", MergeOptions()).peak_host_bytes)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak_bytes = int(done.stdout.split()[-1])
    largest_fp32_bytes = 16384 * 8192 * 4
    assert 2**20 < peak_bytes < 2 * largest_fp32_bytes + 500 * 2**20
    assert peak_bytes < 300 * 2**20, "row blocks of 16 MiB should take far less than the tensor"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > largest_fp32_bytes // 2
