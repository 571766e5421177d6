"""Start training from saved factors: an adapter folder in PEFT's format -> the factors of an adapter that is there already.

The model says what the adapter is (layers, rank, scaling, dropout), the folder only gives its values. So both must agree:
every factor of the model is in the file with its shape, and nothing else is.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from qlora_lite.errors import ModelError
from qlora_lite.model.tensor_files import load_tensors

FACTORS_FILE = "adapter_model.safetensors"


def copy_factors(model: PeftModel, folder: Path) -> None:
    """Give `model` the factors saved in `folder`, rounded to its own type. Raises ModelError with all that does not fit."""
    try:
        saved = load_tensors(folder / FACTORS_FILE)
    except ModelError as error:
        raise ModelError(f"lora.init_from: {folder / FACTORS_FILE} cannot be read ({error})") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = _differences(own, saved)
    if problems:
        raise ModelError(
            f"lora.init_from: {folder} is no adapter of this shape: {'; '.join(problems)}. "
            "Set lora.r and lora.target_modules as it was trained, on the same base model"
        )
    set_peft_model_state_dict(model, saved)


def _differences(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> list[str]:
    lacking, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape)
    problems = []
    if lacking:
        problems.append(f"it lacks {len(lacking)} factors, first {lacking[0]}")
    if unknown:
        problems.append(f"{len(unknown)} of its factors have no place in the model, first {unknown[0]}")
    if reshaped:
        shapes = " instead of ".join("x".join(map(str, side[reshaped[0]].shape)) for side in (saved, own))
        problems.append(f"{len(reshaped)} of its factors have another shape, first {reshaped[0]} with {shapes}")
    return problems
