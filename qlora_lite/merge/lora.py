"""Read a PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors` in, factors of each module out.

delta_W = scaling * B @ A, scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
What changes this formula (DoRA, biases, saved modules, ...) is refused by name, also settings that we do not know.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_lite.errors import ModelError
from qlora_lite.merge.checkpoint import read_json

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings that decide where and how factors were trained, but not what they add once they are trained.
_INERT = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("megatron_core", "qalora_group_size"),  # have defaults that are not empty, and act only with other settings
}
_INIT_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # PiSSA, OLoRA, LoftQ, CorDA change the base


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one module, memory-mapped in the dtype they were saved in."""

    a_RI: Tensor  # [r, in_features]
    b_OR: Tensor  # [out_features, r]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_OR.shape[0], self.a_RI.shape[1]


def read_adapter(folder: Path | str) -> dict[str, LoraFactors]:
    """Module name (as in the base model) -> factors.

    Raises ModelError naming every setting that a merge does not support, every tensor that is not a LoRA factor or
    lacks its partner, and every rank that is not the configured one.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    _refuse(folder, _unsupported_settings(config), "the adapter uses what a merge does not support")
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
    modules = sorted({_module_name(name) for name in tensors if _is_factor(name)})
    problems = [f"{name}: not a LoRA factor" for name in sorted(tensors) if not _is_factor(name)]
    adapter: dict[str, LoraFactors] = {}
    for module in modules:
        a_RI, b_OR = tensors.get(_PREFIX + module + _A), tensors.get(_PREFIX + module + _B)
        if a_RI is None or b_OR is None:
            problems.append(f"{module}: has only one of lora_A and lora_B")
            continue
        r, scaling = rank_and_scaling(config, module)
        if a_RI.dim() != 2 or b_OR.dim() != 2 or (a_RI.shape[0], b_OR.shape[1]) != (r, r):
            shapes = f"lora_A {list(a_RI.shape)}, lora_B {list(b_OR.shape)}"
            problems.append(f"{module}: {shapes}, but adapter_config.json says r={r}")
            continue
        adapter[module] = LoraFactors(a_RI, b_OR, scaling)
    _refuse(folder, problems, "the adapter does not fit together")
    if not adapter:
        raise ModelError(f"{path}: holds no LoRA factors")
    return adapter


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """r and scaling of one module; `rank_pattern` and `alpha_pattern` match as they do in PEFT."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def add_delta_(weight_rows: Tensor, factors: LoraFactors, *, start: int, scale: float) -> None:
    """Add scale * scaling * (B @ A)[start : start + rows] to fp32 rows of the weight, in place and in fp32."""
    b_rows = factors.b_OR[start : start + weight_rows.shape[0]].float()
    weight_rows.addmm_(b_rows, factors.a_RI.to(torch.float32), alpha=scale * factors.scaling)


def _unsupported_settings(config: dict[str, Any]) -> list[str]:
    problems = [f"{key}: {value!r}" for key, value in sorted(config.items()) if value and key not in _INERT]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {config.get('peft_type')!r} (only LORA)")
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {config['bias']!r} (only none)")
    if config.get("init_lora_weights", True) not in _INIT_KEEPS_BASE:
        problems.append(f"init_lora_weights: {config['init_lora_weights']!r} (changes the base weights)")
    problems += [f"{key}: missing" for key in ("r", "lora_alpha") if key not in config]
    return problems


def _refuse(folder: Path, problems: Iterable[str], what: str) -> None:
    lines = list(problems)
    if lines:
        raise ModelError("\n".join([f"{folder}: {what}", *(f"  {line}" for line in lines)]))


def _is_factor(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith((_A, _B))


def _module_name(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
