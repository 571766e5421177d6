"""A tiny NF4 base folder and a LoRA folder with random factors, in the formats that the merge reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_lite.base.bnb import bitsandbytes

SHAPES = {"model.layers.0.up_proj": (33, 40), "model.layers.0.down_proj": (64, 576), "model.layers.1.up_proj": (48, 64)}


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 64).bfloat16(),
        "model.norm.weight": torch.ones(64).bfloat16(),
    }
    for module, shape in SHAPES.items():
        packed, state = bitsandbytes.functional.quantize_4bit(
            (torch.randn(shape) * 0.05).bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        tensors[f"{module}.weight"] = packed
        tensors |= {f"{module}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("template")
    (folder / "generation_config.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    def make(*, shapes=SHAPES, r=4, rename=None, drop=(), **config) -> Path:
        folder = tmp_path / f"adapter-{len(list(tmp_path.glob('adapter-*')))}"
        folder.mkdir()
        tensors = {}
        for module, (out_features, in_features) in shapes.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, in_features).bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = (torch.randn(out_features, r) * 0.01).bfloat16()
        tensors = {(rename or {}).get(name, name): tensor for name, tensor in tensors.items() if name not in drop}
        save_file(tensors, folder / "adapter_model.safetensors")
        defaults = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "bias": "none", "use_rslora": False}
        (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
        return folder

    return make
