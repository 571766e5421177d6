"""Read a PEFT LoRA folder: `adapter_config.json` and `adapter_model.safetensors` in, factors of each module out.

W' = W + scaling * B @ A, scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); DoRA (arXiv 2402.09353) then
scales every row to its trained length. Modules that were trained whole (modules_to_save) are read unchanged, new tokens as rows.
Settings that change these formulas (biases, other methods, ...) and unknown settings are refused by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import A_FACTOR, ADDED_ROWS, B_FACTOR, MAGNITUDE, PREFIX, is_named
from qlora_lite.model.adapter_config import read_adapter_config, token_ids_of
from qlora_lite.model.dora import row_norms
from qlora_lite.model.factors import saved_factors

_A, _B = f"{A_FACTOR}weight", f"{B_FACTOR}weight"


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one module, memory-mapped in their saved dtype, and DoRA's row lengths."""

    a_RI: Tensor  # [r, in_features]
    b_OR: Tensor  # [out_features, r]
    scaling: float
    magnitude_O: Tensor | None = None  # [out_features], fp32

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_OR.shape[0], self.a_RI.shape[1]


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding or a head."""

    ids_N: Tensor  # int64; ids beyond the base's rows follow without a gap
    values_ND: Tensor

    @property
    def num_rows(self) -> int:
        """The smallest number of rows of the tensor."""
        return int(self.ids_N.max()) + 1


@dataclass(frozen=True)
class Adapter:
    """The trained change, by names of the base model: factors per module, whole weights per tensor, single rows per tensor."""

    factors: dict[str, LoraFactors]
    whole: dict[str, Tensor]
    rows: dict[str, "TokenRows"]

    def __len__(self) -> int:
        return len(self.factors) + len(self.whole) + len(self.rows)

    def changes(self, name: str) -> bool:
        """Whether training changed the weight `name`."""
        return name in self.whole or name in self.rows or self.of_weight(name) is not None

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight `name` after training, from the base's `shape`: new tokens may have added rows."""
        return (max(shape[0], self.rows[name].num_rows), *shape[1:]) if name in self.rows else shape

    def of_weight(self, name: str) -> LoraFactors | None:
        """The factors of the weight `name`, or None."""
        return self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter in PEFT's format.

    Raises ModelError with every unsupported setting, every tensor that is not a LoRA factor or lacks its partner, and every rank that
    differs from the config.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = saved_factors(folder)
    modules = sorted({_module_name(name) for name in tensors if _is_factor(name)})
    not_factors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if not _is_factor(name)}
    saved = tuple(config.get("modules_to_save") or ())
    whole = {name: tensor for name, tensor in not_factors.items() if _is_of(name, saved)}
    rows = {
        f"{name.removesuffix(ADDED_ROWS)}.weight": tensor
        for name, tensor in not_factors.items()
        if name.endswith(ADDED_ROWS)
    }
    token_ids = token_ids_of(config)
    known = whole.keys() | {name for name in not_factors if name.endswith(ADDED_ROWS)}
    problems = [f"{PREFIX}{name}: not a LoRA factor" for name in sorted(not_factors.keys() - known)]
    problems += [
        f"{name}: rows of tokens that adapter_config.json does not list"
        for name, values in rows.items()
        if values.dim() != 2 or len(_ids_of(name, token_ids)) != values.shape[0] or not values.shape[0]
    ]
    factors: dict[str, LoraFactors] = {}
    for module in modules:
        a_RI, b_OR = tensors.get(PREFIX + module + _A), tensors.get(PREFIX + module + _B)
        if a_RI is None or b_OR is None:
            problems.append(f"{module}: has only one of lora_A and lora_B")
            continue
        r, scaling = rank_and_scaling(config, module)
        if a_RI.dim() != 2 or b_OR.dim() != 2 or (a_RI.shape[0], b_OR.shape[1]) != (r, r):
            shapes = f"lora_A {list(a_RI.shape)}, lora_B {list(b_OR.shape)}"
            problems.append(f"{module}: {shapes}, but r={r} in adapter_config.json")
            continue
        magnitude_O = tensors.get(PREFIX + module + MAGNITUDE)
        if (magnitude_O is not None) != bool(config.get("use_dora")):
            problems.append(f"{module}: {'has' if magnitude_O is not None else 'lacks'} DoRA's magnitudes")
            continue
        factors[module] = LoraFactors(a_RI, b_OR, scaling, magnitude_O)
    if problems:
        raise ModelError("\n".join([f"{folder}: the adapter is inconsistent", *(f"  {line}" for line in problems)]))
    if not factors and not whole:
        raise ModelError(f"{folder}: holds no LoRA factors")
    return Adapter(
        factors,
        whole,
        {name: TokenRows(torch.tensor(_ids_of(name, token_ids)), values) for name, values in rows.items()},
    )


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """-> (r, scaling) of one module; `rank_pattern` and `alpha_pattern` match as in PEFT."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def change_rows_(weight_rows: Tensor, factors: LoraFactors, *, start: int, scale: float) -> None:
    """Change fp32 rows of the weight, from row `start` on, to rows of W + scale * (W' - W), in place."""
    rows = slice(start, start + weight_rows.shape[0])
    b_rows, a_RI = factors.b_OR[rows].float(), factors.a_RI.to(torch.float32)
    if factors.magnitude_O is None:
        weight_rows.addmm_(b_rows, a_RI, alpha=scale * factors.scaling)
        return
    share_O = factors.magnitude_O[rows].float() / tuned_norms(weight_rows, factors, start=start)
    weight_rows.mul_((1 + scale * (share_O - 1))[:, None])
    weight_rows.addmm_(b_rows * (scale * factors.scaling * share_O)[:, None], a_RI)


def tuned_norms(weight_rows: Tensor, factors: LoraFactors, *, start: int) -> Tensor:
    """||W + scaling * B A|| of fp32 rows of the weight, from row `start` on (model/dora.py)."""
    a_RI = factors.a_RI.float()
    b_rows = factors.scaling * factors.b_OR[start : start + weight_rows.shape[0]].float()
    return row_norms(weight_rows.square().sum(1), weight_rows @ a_RI.T, a_RI, b_rows)


def _is_factor(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith((_A, _B, MAGNITUDE))


def _is_of(name: str, modules: tuple[str, ...]) -> bool:
    """Whether tensor `name` belongs to a module whose name is, or ends in, one of `modules`."""
    module = name.rpartition(".")[0]
    return any(is_named(module, ending) for ending in modules)


def _ids_of(name: str, token_ids: dict[str, list[int]]) -> list[int]:
    """The token ids of the weight `name`, looked up by the ending of its module's name."""
    return next((ids for ending, ids in token_ids.items() if _is_of(name, (ending,))), [])


def _module_name(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(_A).removesuffix(_B).removesuffix(MAGNITUDE)
