"""`model.base` of a recipe (a folder, a .gguf file, a shipped name, a hub name) -> a folder of 16-bit safetensors.

The rest of the program uses only such folders. Opens no connection: a shipped or hub model that is not in the cache is an error
with the command that downloads it.
"""

import json
import math
import os
import shlex
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_lite.base.gguf_folder import convert_gguf
from qlora_lite.base.shipped import SHIPPED, shipped_path
from qlora_lite.errors import ModelError
from qlora_lite.files.json_text import parse_json
from qlora_lite.files.library_names import CONFIG_FILE, PICKLES
from qlora_lite.foreign import foreign
from qlora_lite.limits import JSON_BYTES, LAYERS, POSITIONS, VOCABULARY, WIDTH
from qlora_lite.recipe.hub_names import fetch_command, find_fetched, is_hub_name

# transformers' model_type -> common name. tests/test_architectures.py runs each from published files to a proved merge.
ARCHITECTURES = {
    "llama": "Llama 2 and 3, SmolLM2",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi3": "Phi-3, Phi-4",
    "bloom": "BLOOM",
    "falcon": "Falcon",
    "gpt_neox": "GPT-NeoX, Pythia",
    "opt": "OPT",
    "olmo2": "OLMo 2",
    "granite": "Granite",
    "starcoder2": "StarCoder2",
}
# Sizes in a config -> the largest value accepted: they allocate memory before a weight is read.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embed", "n_embd", "word_embed_proj_dim", "head_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"), WIDTH),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}
# Keys that would make transformers load foreign code or kernels. We choose the attention ourselves.
_FOREIGN = {
    *("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("use_kernels", "kernel_config", "custom_generate"),
}


def find_base(base: str, *, cache: Path, revision: str | None = None) -> Path:
    """Return the folder with config.json and safetensors for `base`; converts a GGUF file into the cache first.

    With a `revision` (branch, tag, commit), `base` is a hub name; without one, an existing folder takes precedence over the
    commit fetched last.

    Raises ModelError when the model is missing, damaged, or of an unsupported kind.
    """
    path = Path(os.path.expanduser(base))
    if base in SHIPPED and not path.exists():
        path = shipped_path(base, cache=cache)
        if not path.is_file():
            raise ModelError(
                f"model.base: {base} is not in the cache ({path.parent}). Fetch it with: qlora-lite fetch {base}"
            )
    elif is_hub_name(base) and (revision is not None or not path.exists()):
        path = _fetched_folder(base, revision, cache=cache)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a base is a folder with config.json and safetensors, or a .gguf file")
        path = convert_gguf(path, cache=cache)
    if not path.is_dir():
        raise ModelError(f"{base}: no such folder, .gguf file or shipped name ({', '.join(SHIPPED)})")
    read_config(path)
    _refuse_pickles(path)
    return path


def _fetched_folder(repo: str, revision: str | None, *, cache: Path) -> Path:
    folder = find_fetched(repo, revision, cache=cache)
    if folder is None:
        raise ModelError(
            f"model.base: no folder {repo}, and not fetched into {cache}. Fetch it with: {fetch_command(repo, revision)}"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read the language model's part of the folder's config.json.

    A `pad_token_id` without an embedding row becomes None. Raises ModelError when the file is missing, damaged or of an unsupported
    kind, with the reason.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{folder}: not a model folder: config.json is missing. Expected config.json and *.safetensors"
        )
    config = read_json(path)
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict):
        config = _language_model(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported{_why_not(config)}; supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_sizes(path, config)
    if _is_no_row(config.get("pad_token_id"), config.get("vocab_size")):
        config["pad_token_id"] = None
    return {key: value for key, value in config.items() if key not in _FOREIGN}


def _is_no_row(token: Any, vocabulary: Any) -> bool:
    """Whether a padding token lies outside an embedding of `vocabulary` rows; torch counts negative ids from the end.

    transformers cannot build a model with such a token, and we never pad, so it is read as None.
    """
    return type(token) is int and type(vocabulary) is int and not -vocabulary <= token < vocabulary


def _refuse_pickles(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.is_file())
    if not names or any(folder.glob("*.safetensors*")):
        return
    out = f"{folder}-safetensors"
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}).save_pretrained({out!r})"
    raise ModelError(
        f"{folder}: has only pickled weights ({names[0]}), which can run code when read and are therefore refused. If you trust them, "
        f"convert them with: python -c {shlex.quote(code)}  and copy the tokenizer files beside the result"
    )


def _refuse_sizes(path: Path, config: dict[str, Any]) -> None:
    problems = []
    for key, largest in _SIZES.items():
        value = config.get(key)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            problems.append(f"{key}: expected a whole number from 1 to {largest:,}, got {str(value)[:60]}")
    problems += [
        f"{key}: {value}" for key, value in config.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not problems and heads and shared and heads % shared:
        problems.append(f"num_key_value_heads: {shared} does not divide num_attention_heads, {heads}")
    if problems:
        raise ModelError(f"{path}: does not describe a usable model ({'; '.join(problems)})")


def load_config(folder: Path) -> Any:
    """Load the language model's config as transformers' type. Raises ModelError as `read_config` does, and for values of a wrong type."""
    from transformers import AutoConfig

    values = read_config(folder)
    with foreign(lambda reason: ModelError(f"{folder / CONFIG_FILE}: does not describe a usable model ({reason})")):
        config = AutoConfig.for_model(**values)
        config.to_json_string(use_diff=False)  # a plan and a merge need it later
    if _is_no_row(config.pad_token_id, config.vocab_size):  # the default of the architecture (Phi-3: 32000)
        config.pad_token_id = None
    config.name_or_path = str(folder)
    return config


def context_window(config: Any) -> int | None:
    """Return the context window in tokens; None for a model without a limit (BLOOM: ALiBi, arXiv 2108.12409)."""
    return getattr(config, "max_position_embeddings", None)


def has_learned_positions(config: Any) -> bool:
    """Whether positions beyond the context window do not exist (OPT: one trained row each); rotary ones exist for any token."""
    return context_window(config) is not None and not getattr(config, "rope_parameters", None)


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return Gemma 3's `text_config` as a config of its own, with the token ids and dtype of the whole config."""
    shared: dict[str, Any] = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
        if key in config
    }
    dtype = config.get("dtype") or config.get("torch_dtype")
    text: dict[str, Any] = config["text_config"]
    return {"dtype": dtype, **shared, **text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _why_not(config: dict[str, Any]) -> str:
    """Return the reason if the config shows one: most unsupported models are of one of four kinds."""
    model_type = str(config.get("model_type"))
    if any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")):
        return ": a mixture of experts, whose expert weights are not separate linear layers that can be quantized"
    if "vision_config" in config or "audio_config" in config:
        return ": it takes images or sound; of such checkpoints only Gemma 3's language model is supported"
    if config.get("is_encoder_decoder"):
        return ": an encoder-decoder; only decoders (causal language models) are supported"
    if any(word in model_type for word in ("mamba", "rwkv", "recurrent", "ssm", "jamba", "zamba", "bamba")) or any(
        key in config for key in ("state_size", "ssm_cfg", "mamba_d_state", "layers_block_type")
    ):
        return ": a state-space or recurrent model, which has other layers than linear ones and attention"
    return ""


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises ModelError for anything else."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block forever
            raise ModelError(f"{path}: not a regular file")
        if path.stat().st_size > JSON_BYTES:
            raise ModelError(f"{path}: larger than {JSON_BYTES:,} bytes, too large for a file of this kind")
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def folder_fingerprint(folder: Path) -> str:
    """Return a short hash over names, sizes and modification times of a folder's files (hashing contents at each start is too slow)."""
    stats = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    entries = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return sha256(json.dumps([os.fspath(folder.resolve()), entries]).encode()).hexdigest()[:16]
