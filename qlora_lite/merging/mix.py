"""The weighted sum of adapters, `sum_i weight_i * change_i`, as one adapter.

In: adapters and their weights (a negative weight subtracts). Out: an `Adapter` of the sum, and its distance from the exact sum. The sum
is exact with the factors side by side; ranks add up:

    sum_i w_i s_i B_i A_i  =  [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]          (scaling 1, so rsLoRA and any alpha are right)

or, with a rank, its best approximation (spectrum.py). A module that only some adapters have comes from these alone.

Refused by name: DoRA (it scales rows by the length of the sum, which is not additive), modules that were trained whole and rows of new
tokens (their change depends on the base). Why not PEFT's `add_weighted_adapter` (0.21): its "linear" adds the factors themselves, so
every A_i multiplies every B_j, which is not the sum of the changes; and with rsLoRA its "cat" and "svd" are sqrt(r) times too large
(tests/merging/test_mix.py shows both, and that "cat" is right for plain LoRA).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.errors import ModelError, UserError
from qlora_lite.files.library_names import A_FACTOR, ADAPTER_CONFIG_FILE, B_FACTOR, FACTORS_FILE, PREFIX, is_named
from qlora_lite.files.manifest import write_manifest
from qlora_lite.files.safetensors_writer import ShardedWriter, TensorSpec
from qlora_lite.files.staging import staged_folder
from qlora_lite.merging.lora import Adapter, LoraFactors
from qlora_lite.merging.spectrum import lost_share, ranks_of_equal, spectra, truncated_adapter
from qlora_lite.model.int8_factors import INT8_FILE, to_int8

FACTOR_DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Part:
    """One adapter of a mix. `weights` are weights of modules by the ending of their name; all other modules have `weight`."""

    name: str
    adapter: Adapter
    weight: float
    weights: Mapping[str, float]

    def weight_of(self, module: str) -> float:
        endings = [ending for ending in self.weights if is_named(module, ending)]
        return self.weights[max(endings, key=len)] if endings else self.weight


@dataclass(frozen=True)
class Mix:
    """The sum as one adapter; `lost_share` is the share of the sum that a lower rank lost (0.0 when exact)."""

    adapter: Adapter
    lost_share: float

    @property
    def r(self) -> int:
        """The highest rank of a module."""
        return max(factors.a_RI.shape[0] for factors in self.adapter.factors.values())


def mix_adapters(parts: Sequence[Part], *, rank: int | None = None) -> Mix:
    """Add the changes of `parts`, exactly or at `rank`. Raises ModelError for changes that are not of low rank."""
    problems = [problem for part in parts for problem in _not_a_sum(part)]
    factors: dict[str, LoraFactors] = {}
    for module in sorted({module for part in parts for module in part.adapter.factors}):
        of_parts = [(part, part.adapter.factors[module]) for part in parts if module in part.adapter.factors]
        shapes = {part_factors.shape for _, part_factors in of_parts}
        if len(shapes) > 1:
            problems.append(
                f"{module}: {' and '.join(str(list(shape)) for shape in sorted(shapes))}: shapes of different models"
            )
            continue
        kept = [
            (part.weight_of(module), part_factors) for part, part_factors in of_parts if part.weight_of(module) != 0
        ]
        if kept:
            factors[module] = _side_by_side(kept)
    for part in parts:
        unknown = [
            ending for ending in part.weights if not any(is_named(module, ending) for module in part.adapter.factors)
        ]
        problems += [f"{part.name}: {ending} is not a module of this adapter" for ending in unknown]
    if problems:
        raise ModelError("\n".join(["these adapters cannot be mixed", *(f"  {problem}" for problem in problems)]))
    if not factors:
        raise ModelError("every weight is 0, so the mix would be empty")
    exact = Adapter(factors, {}, {})
    if rank is None:
        return Mix(exact, 0.0)
    module_spectra = spectra(exact)
    ranks = ranks_of_equal(module_spectra, rank)
    return Mix(truncated_adapter(exact, ranks), lost_share(module_spectra, ranks))


def _side_by_side(kept: Sequence[tuple[float, LoraFactors]]) -> LoraFactors:
    a_RI = torch.cat([factors.a_RI.float() for _, factors in kept])
    b_OR = torch.cat([weight * factors.scaling * factors.b_OR.float() for weight, factors in kept], dim=1)
    return LoraFactors(a_RI, b_OR, 1.0)


def _not_a_sum(part: Part) -> list[str]:
    adapter = part.adapter
    dora = [name for name, factors in adapter.factors.items() if factors.magnitude_O is not None]
    problems = [] if math.isfinite(part.weight) else [f"{part.name}: expected a finite weight, got {part.weight}"]
    problems += [f"{part.name}: DoRA (first {dora[0]}), whose change is not a sum"] if dora else []
    problems += [f"{part.name}: {name} was trained whole" for name in sorted(adapter.whole)]
    return problems + [f"{part.name}: {name} has rows of new tokens" for name in sorted(adapter.rows)]


def write_adapter(
    adapter: Adapter,
    out: Path,
    *,
    base_name: str,
    made_of: Mapping[str, Any],
    dtype: str = "fp32",
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter that consists of factors in PEFT's format, with a manifest; `texts` are further files. `out` must not exist.

    Ranks may differ between modules (`rank_pattern`). Factors are fp32 by default, so the file holds the computed values; `dtype` may
    also be "bf16", or "int8" (model/int8_factors.py: readable by this program, not by plain peft). Raises UserError for another dtype.
    """
    if dtype not in FACTOR_DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(FACTOR_DTYPES)}, got {dtype!r}")
    with staged_folder(out) as folder:
        tensors = _named_tensors(adapter, torch.bfloat16 if dtype == "bf16" else torch.float32)
        file = FACTORS_FILE
        if dtype == "int8":
            tensors, file = to_int8(tensors), INT8_FILE
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with ShardedWriter(folder, specs, stem=file.removesuffix(".safetensors"), max_shard_bytes=2**62) as writer:
            for name, tensor in tensors.items():
                writer.write(name, [tensor])
        text = json.dumps(_config(adapter, base_name), indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
        for name, content in (texts or {}).items():
            (folder / name).write_text(content, encoding="utf-8")
        write_manifest(folder, {"made_of": dict(made_of)})
    return out


def _named_tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        tensors[f"{PREFIX}{module}{A_FACTOR}weight"] = factors.a_RI.to(dtype)
        tensors[f"{PREFIX}{module}{B_FACTOR}weight"] = (factors.scaling * factors.b_OR.float()).to(dtype)
    return tensors


def _config(adapter: Adapter, base_name: str) -> dict[str, Any]:
    """adapter_config.json with `alpha = r` everywhere: the scaling is in B."""
    ranks = {module: factors.a_RI.shape[0] for module, factors in adapter.factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    unusual = {module: r for module, r in ranks.items() if r != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
