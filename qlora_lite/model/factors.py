"""The saved factors of an adapter folder: read from PEFT's file or from 8 bits, and copied into an existing adapter.

When training starts from them, the model defines the adapter (layers, rank, scaling, dropout) and the folder gives only the values. Both
must agree: the file has every factor of the model, with its shape, and no other.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from qlora_lite.base.finite import NotFiniteWeights, refuse_not_finite
from qlora_lite.base.tensor_files import load_tensors
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import ADAPTER_CONFIG_FILE, FACTORS_FILE
from qlora_lite.model.int8_factors import INT8_FILE, from_int8


def saved_factors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the adapter in `folder`, by PEFT's names; memory-mapped, except 8-bit ones.

    Raises ModelError, and its subclass NotFiniteWeights for values that are not finite.
    """
    file = factors_file(folder)
    tensors = load_tensors(file)
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, name, where=file)
    if file.name == FACTORS_FILE:
        return tensors
    try:
        return from_int8(tensors)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error


@contextmanager
def in_pefts_file(folder: Path) -> Iterator[Path]:
    """A folder with this adapter for plain peft: `folder` itself, or a temporary one for 8-bit factors. Raises ModelError."""
    if factors_file(folder).name == FACTORS_FILE:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qlora-lite-") as name:
        plain = Path(name)
        shutil.copyfile(folder / ADAPTER_CONFIG_FILE, plain / ADAPTER_CONFIG_FILE)
        save_file(saved_factors(folder), plain / FACTORS_FILE)
        yield plain


def factors_file(folder: Path) -> Path:
    """PEFT's file, or the file of 8-bit factors if only that exists."""
    is_in_8_bits = (folder / INT8_FILE).is_file() and not (folder / FACTORS_FILE).is_file()
    return folder / (INT8_FILE if is_in_8_bits else FACTORS_FILE)


def copy_factors(model: PeftModel, folder: Path) -> None:
    """Copy the factors saved in `folder` into `model`, rounded to its type. Raises ModelError with all differences."""
    try:
        saved = saved_factors(folder)
    except NotFiniteWeights as error:
        raise NotFiniteWeights(f"lora.init_from: {error}") from error
    except ModelError as error:
        raise ModelError(f"lora.init_from: {factors_file(folder)} cannot be read ({error})") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = _differences(own, saved)
    if problems:
        raise ModelError(
            f"lora.init_from: {folder} does not have the shape of this adapter: {'; '.join(problems)}. "
            "Set lora.r and lora.target_modules as it was trained, on the same base model"
        )
    set_peft_model_state_dict(model, saved)


def _differences(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> list[str]:
    lacking, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape)
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} factors are missing, first {lacking[0]}")
    if unknown:
        problems.append(f"{len(unknown)} factors have no place in the model, first {unknown[0]}")
    if reshaped:
        shapes = " instead of ".join("x".join(map(str, side[reshaped[0]].shape)) for side in (saved, own))
        problems.append(f"{len(reshaped)} factors have another shape, first {reshaped[0]} with {shapes}")
    return problems
