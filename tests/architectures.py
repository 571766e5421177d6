"""Tiny random models in the layout in which each architecture is *published*, which `save_pretrained` does not write.

`Published` is one row: the published config.json with small sizes, how the published files call each weight, their type and
number, whether they hold a head beside a tied embedding, and what else lies in them. `source` is the model whose repository on
the hub is laid out so (its config.json, its model.safetensors.index.json or the keys of its one file).
"""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.base.artefact import quantize_base
from tests.data.tiny_tokenizer import make_tokenizer

LLAMA_SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One architecture as one model publishes it."""

    source: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    num_shards: int = 1
    is_tied: bool = False
    holds_tied_head: bool = False  # the files hold lm_head although it is the embedding
    key: Callable[[str], str] = lambda name: name  # a module's weight -> its key in the published files
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)  # keys that are no weight of the language model
    num_vision: int = 0  # of these, tensors of a vision tower


def _without_prefix(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _renamed(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda name: re.sub(pattern, replacement, name)


PUBLISHED: dict[str, Published] = {
    "llama2": Published(
        "meta-llama/Llama-2-7b-hf",
        {"model_type": "llama", **LLAMA_SIZES, "num_key_value_heads": 4, "rope_scaling": None, "rms_norm_eps": 1e-5},
        dtype=torch.float16,
        num_shards=2,
        extra={f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(2)},
    ),
    "llama3": Published(
        "meta-llama/Llama-3.1-8B",
        {"model_type": "llama", **LLAMA_SIZES, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        num_shards=4,
    ),
    "llama3_tied": Published(
        "meta-llama/Llama-3.2-1B",
        {"model_type": "llama", **LLAMA_SIZES, "head_dim": 16, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE,
         "tie_word_embeddings": True},
        is_tied=True,
    ),
    "smollm2": Published(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"model_type": "llama", **LLAMA_SIZES, "rope_theta": 100000, "rope_interleaved": False, "tie_word_embeddings": True},
        is_tied=True,
    ),
    "smollm3": Published(
        "HuggingFaceTB/SmolLM3-3B",
        {"model_type": "smollm3", **LLAMA_SIZES, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0],
         "no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None, "rope_theta": 5000000.0,
         "pad_token_id": 0, "tie_word_embeddings": True},
        num_shards=2,
        is_tied=True,
    ),
    "qwen2": Published(
        "Qwen/Qwen2.5-7B-Instruct",
        {"model_type": "qwen2", **LLAMA_SIZES, "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 131072,
         "max_window_layers": 28, "tie_word_embeddings": False},
        num_shards=4,
    ),
    "qwen3": Published(
        "Qwen/Qwen3-8B",
        {"model_type": "qwen3", **LLAMA_SIZES, "head_dim": 32, "attention_bias": False, "rope_theta": 1000000,
         "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "tie_word_embeddings": False},
        num_shards=5,
    ),
    "mistral": Published(
        "mistralai/Mistral-7B-v0.1",
        {"model_type": "mistral", **LLAMA_SIZES, "sliding_window": 16, "rope_theta": 10000.0, "tie_word_embeddings": False},
        num_shards=2,
    ),
    "gemma2": Published(
        "google/gemma-2-2b",
        {"model_type": "gemma2", **LLAMA_SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
         "cache_implementation": "hybrid", "pad_token_id": 0},
        num_shards=3,
        is_tied=True,
    ),
    "gemma3": Published(
        "google/gemma-3-4b-it",
        {"model_type": "gemma3", "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7, "eos_token_id": [1, 2],
         "mm_tokens_per_image": 4, "architectures": ["Gemma3ForConditionalGeneration"],
         "text_config": {**LLAMA_SIZES, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16,
                         "query_pre_attn_scalar": 16, "sliding_window": 16, "pad_token_id": 0,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 1}},
        num_shards=2,
        is_tied=True,
        key=lambda name: f"language_model.{name}",
        extra={"vision_tower.vision_model.embeddings.patch_embedding.weight": (64, 3, 14, 14),
               "vision_tower.vision_model.post_layernorm.weight": (64,),
               "multi_modal_projector.mm_input_projection_weight": (64, 64)},
        num_vision=3,
    ),
    "gemma3_text": Published(
        "google/gemma-3-1b-it",
        {"model_type": "gemma3_text", **LLAMA_SIZES, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16,
         "sliding_window": 16, "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
         "pad_token_id": 0, "eos_token_id": [1, 2]},
        is_tied=True,
    ),
    "phi3": Published(
        "microsoft/Phi-3-mini-4k-instruct",
        {"model_type": "phi3", **LLAMA_SIZES, "num_key_value_heads": 4, "sliding_window": 16, "rope_scaling": None,
         "original_max_position_embeddings": 512, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 0,
         "tie_word_embeddings": False},
        num_shards=2,
    ),
    "phi4": Published(
        "microsoft/Phi-4-mini-instruct",
        {"model_type": "phi3", **LLAMA_SIZES, "partial_rotary_factor": 0.75, "sliding_window": None, "pad_token_id": 0,
         "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
         "original_max_position_embeddings": 128, "tie_word_embeddings": True},
        num_shards=2,
        is_tied=True,
    ),
    "bloom": Published(
        "bigscience/bloom-560m",
        {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "pretraining_tp": 1, "n_inner": None,
         "slow_but_exact": False, "seq_length": 512, "attention_softmax_in_fp32": True, "offset_alibi": 100,
         "hidden_dropout": 0.0, "attention_dropout": 0.0, "apply_residual_connection_post_layernorm": False},
        dtype=torch.float16,
        is_tied=True,
        key=_without_prefix("transformer."),
    ),
    "falcon_old": Published(
        "tiiuae/falcon-7b",
        {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True,
         "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False, "hidden_dropout": 0.0},
        num_shards=2,
        is_tied=True,
        holds_tied_head=True,
    ),
    "falcon_new": Published(
        "tiiuae/falcon-40b",
        {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
         "parallel_attn": True, "new_decoder_architecture": True, "alibi": False, "bias": False, "hidden_dropout": 0.0},
        num_shards=3,
        is_tied=True,
        holds_tied_head=True,
    ),
    "falcon_alibi": Published(
        "tiiuae/falcon-rw-1b",
        {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": False,
         "parallel_attn": False, "new_decoder_architecture": False, "alibi": True, "bias": True, "hidden_dropout": 0.0},
        is_tied=True,
        holds_tied_head=True,
    ),
    "gpt_neox": Published(
        "EleutherAI/pythia-160m",
        {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512, "rotary_pct": 0.25, "rotary_emb_base": 10000,
         "use_parallel_residual": True, "hidden_act": "gelu", "tie_word_embeddings": False},
        dtype=torch.float16,
        key=_renamed(r"^lm_head\.", "embed_out."),
        extra={f"gpt_neox.layers.{i}.attention.{end}": shape for i in range(2) for end, shape in (
            ("bias", (1, 1, 32, 32)), ("masked_bias", ()), ("rotary_emb.inv_freq", (2,)))},
    ),
    "opt": Published(
        "facebook/opt-125m",
        {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512, "do_layer_norm_before": True, "dropout": 0.1,
         "attention_dropout": 0.0, "activation_function": "relu", "pad_token_id": 1, "prefix": "</s>"},
        dtype=torch.float16,
        is_tied=True,
        holds_tied_head=True,
    ),
    "opt_350m": Published(
        "facebook/opt-350m",
        {"model_type": "opt", "hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512, "do_layer_norm_before": False, "dropout": 0.1,
         "pad_token_id": 1},
        dtype=torch.float16,
        is_tied=True,
        key=_without_prefix("model."),
    ),
    "olmo2": Published(
        "allenai/OLMo-2-1124-7B",
        {"model_type": "olmo2", **LLAMA_SIZES, "num_key_value_heads": 4, "rope_theta": 500000, "rope_scaling": None,
         "tie_word_embeddings": False},
        dtype=torch.float32,
        num_shards=6,
    ),
    "granite": Published(
        "ibm-granite/granite-3.1-2b-instruct",
        {"model_type": "granite", **LLAMA_SIZES, "attention_bias": False, "attention_multiplier": 0.0625,
         "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "rope_theta": 5000000.0,
         "attention_dropout": 0.1, "tie_word_embeddings": True},
        num_shards=2,
        is_tied=True,
    ),
    "starcoder2": Published(
        "bigcode/starcoder2-3b",
        {"model_type": "starcoder2", **LLAMA_SIZES, "sliding_window": 16, "use_bias": True, "norm_epsilon": 1e-5,
         "norm_type": "layer_norm", "mlp_type": "default", "residual_dropout": 0.1, "embedding_dropout": 0.1,
         "attention_dropout": 0.1, "rope_theta": 999999.4420358813},
        dtype=torch.float32,
        is_tied=True,
    ),
}  # fmt: skip


@functools.cache
def published(name: str) -> Path:
    """The folder that `write_published` makes, shared by all tests: read only."""
    return write_published(_root() / name, name)


@functools.cache
def artefact(name: str) -> Path:
    """Its NF4 artefact, shared by all tests: read only."""
    return quantize_base(published(name), cache=_root() / "cache")


def widen_windows(model: torch.nn.Module, length: int) -> None:
    """Of every layer that has one."""
    model.config.sliding_window = length
    for layer in model.modules():
        if getattr(layer, "sliding_window", None) is not None:
            layer.sliding_window = length


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="qlora-lite-architectures-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def write_published(folder: Path, name: str) -> Path:
    """A tiny random model in the published layout of PUBLISHED[name], with the tiny tokenizer."""
    row, weights, config, tokenizer = PUBLISHED[name], own_weights(name), published_config(name), make_tokenizer()
    if row.is_tied and not row.holds_tied_head:
        del weights["lm_head.weight"]
    stored = {row.key(key): tensor.to(row.dtype) for key, tensor in weights.items()}
    stored |= {key: torch.randn(shape).to(row.dtype) for key, shape in row.extra.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
    _save_shards(folder, stored, row.num_shards)
    return folder


def published_config(name: str) -> dict[str, Any]:
    """config.json as it is published, with the tiny tokenizer's numbers."""
    row, tokenizer = PUBLISHED[name], make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    config = {**ids, "torch_dtype": str(row.dtype).removeprefix("torch."), **row.config}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "vocab_size": config.pop("vocab_size")}
    return config


def own_weights(name: str, *, std: float = 0.1) -> dict[str, torch.Tensor]:
    """The model's weights in fp32 by module name; larger than usual initial values, so that every part has an effect."""
    config = published_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config.get("text_config", config)), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * std if parameter.dim() > 1 else parameter + 0.1 * noise)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _save_shards(folder: Path, stored: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        keys = list(stored)[shard::num_shards]
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({key: stored[key] for key in keys}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in stored.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
