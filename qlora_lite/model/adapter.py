"""The adapter: thin bf16 factors on the frozen linear layers, by peft, with fp32 gradients.

LoRA (arXiv 2106.09685) learns a change of each weight, W + scaling * B @ A, with A [R, in] and B [out, R]; scaling is
lora_alpha / R, or lora_alpha / sqrt(R) for rsLoRA (arXiv 2312.03732). B starts at zero, so training starts at the base model.

peft places, names, saves and loads the factors. Two parts are ours. The gradients of factors are fp32 (`FactorLinear`): bf16 autograd
rounds the gradient of each micro-batch to 8 bits before the sum (5e-3 off after 16 micro-batches); in fp32 the split of a step has no
visible effect. And the layers compute base and change in one product (tuned_linear.py).
"""

import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from qlora_lite.base.bnb import bitsandbytes, keep_weights_unpacked
from qlora_lite.base.finite import NotFiniteWeights
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import A_FACTOR, B_FACTOR, WHOLE_MODULE, is_named
from qlora_lite.foreign import foreign
from qlora_lite.model.adapter_config import read_adapter_config
from qlora_lite.model.dora import Dora
from qlora_lite.model.factors import in_pefts_file, saved_factors
from qlora_lite.model.new_tokens import set_up_new_tokens, token_modules
from qlora_lite.model.products import product_in_fp32
from qlora_lite.model.tuned_linear import TunedLinear


@dataclass(frozen=True)
class Lora:
    """An adapter's hyperparameters, by PEFT's names."""

    r: int
    lora_alpha: int
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"  # name endings, or "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Sequence[str] = ()  # name endings of modules that are trained whole, as copies in their own type


def attach_adapter(
    model: PreTrainedModel,
    lora: Lora,
    *,
    new_token_ids: Sequence[int] = (),
    factor_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PeftModel:
    """Wrap `model` with a new trainable adapter; the base is frozen. In embedding and head, the rows of `new_token_ids` are trained.

    Raises ModelError when a name matches no linear layer, or no module that can be trained whole.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    whole = modules_trained_whole(
        model, target_modules=targets, modules_to_save=lora.modules_to_save, has_new_tokens=bool(new_token_ids)
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=whole
        or None,  # full names: peft matches a name as the end of a longer one, with or without a dot
        trainable_token_indices={name: list(new_token_ids) for name in token_modules(model)} if new_token_ids else None,
    )
    with torch.random.fork_rng(devices=[]):  # the factors' seed must not change other random streams
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a deprecated name of transformers
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    return _prepare(adapted, factor_dtype, is_new=True)


def modules_trained_whole(
    model: PreTrainedModel, *, target_modules: str | list[str], modules_to_save: Sequence[str], has_new_tokens: bool
) -> list[str]:
    """The full names of `modules_to_save`. Only names and types of `model` are read, so it may be on meta.

    Raises ModelError for a name, of these or of `target_modules`, that matches no module or conflicts with another.
    """
    targets = _named_targets(model, target_modules) if isinstance(target_modules, list) else []
    whole = _whole_modules(model, modules_to_save)
    both = sorted(set(targets) & set(whole))
    if both:
        raise ModelError(f"lora.modules_to_save: {both[0]} is also in lora.target_modules. Leave one of them out")
    _refuse_meeting_new_tokens(model, [*targets, *whole], has_new_tokens)
    return whole


def load_adapter(model: PreTrainedModel, folder: Path, *, factor_dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    """Wrap `model` with the adapter saved in `folder` (PEFT's format), frozen. Raises ModelError when it does not fit the model."""
    try:
        read_adapter_config(folder)
        saved = saved_factors(folder)
    except NotFiniteWeights:
        raise
    except ModelError as error:
        raise ModelError(f"{folder}: not an adapter of this model ({error})") from error
    with (
        in_pefts_file(folder) as plain,
        foreign(lambda said: ModelError(f"{folder}: not an adapter of this model ({said})")),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # missing keys are an error below, not a warning
        adapted = PeftModel.from_pretrained(model, str(plain), autocast_adapter_dtype=False)
    _refuse_other_factors(adapted, saved.keys(), folder)
    _prepare(adapted, factor_dtype, is_new=False)
    if adapted.peft_config["default"].use_dora:  # peft has rounded the fp32 magnitudes to its own 16-bit ones
        set_peft_model_state_dict(adapted, saved)
    return adapted


def save_adapter(model: PeftModel, folder: Path, *, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors for plain `PeftModel.from_pretrained`."""
    config = model.peft_config["default"]
    before = config.base_model_name_or_path
    config.base_model_name_or_path = base_name
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before
    readme = folder / "README.md"  # peft writes an empty model card
    readme.unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors creates files that only their owner may read


class _FactorProduct(torch.autograd.Function):
    """y = x @ W.T as in `nn.Linear`, with the gradient of W computed and returned in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product_in_fp32(grad_y.reshape(-1, grad_y.shape[-1]).T, x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight


class FactorLinear(torch.nn.Linear):
    """A LoRA factor [out, in], stored and multiplied in 16 bits, with an fp32 gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FactorProduct.apply(input, self.weight)


def _prepare(adapted: PeftModel, factor_dtype: torch.dtype, *, is_new: bool) -> PeftModel:
    for name, module in list(adapted.named_modules()):
        if type(module) is torch.nn.Linear and name.endswith((f"{A_FACTOR}default", f"{B_FACTOR}default")):
            _replace(adapted, name, _factor(module, factor_dtype))
        elif name.endswith(WHOLE_MODULE):
            _set_up_whole(adapted, name, module)
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, LoraLayer):
            dora = _set_up_dora(layer, is_new=is_new) if layer.lora_magnitude_vector else None
            _replace(adapted, name, TunedLinear(layer, dora))
    set_up_new_tokens(adapted)
    keep_weights_unpacked(adapted)
    return adapted


def _factor(linear: torch.nn.Linear, dtype: torch.dtype) -> FactorLinear:
    factor = FactorLinear(linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype)
    factor.weight = torch.nn.Parameter(linear.weight.detach().to(dtype), requires_grad=linear.weight.requires_grad)
    if factor.weight.requires_grad:
        factor.weight.grad_dtype = torch.float32
    return factor


def _set_up_whole(adapted: PeftModel, name: str, module: torch.nn.Module) -> None:
    """Set up a module that is trained whole: gradients are summed in fp32. Those of a linear layer are also computed in fp32, as for
    factors; autograd rounds those of norms and embeddings once per micro-batch.
    """
    if type(module) is torch.nn.Linear and module.bias is None:
        _replace(adapted, name, _factor(module, module.weight.dtype))
        return
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def _set_up_dora(layer: LoraLayer, *, is_new: bool) -> Dora:
    """Set the magnitudes, in fp32: the weight's row norms for a new adapter, else the loaded ones."""
    dora = Dora(layer)
    holder = layer.lora_magnitude_vector["default"]
    loaded = torch.nn.Parameter(holder.weight.detach().float(), requires_grad=holder.weight.requires_grad)
    holder.weight = dora.first_magnitudes() if is_new else loaded
    return dora


def _replace(root: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = module


def _refuse_other_factors(adapted: PeftModel, saved: Set[str], folder: Path) -> None:
    """Raise ModelError unless file and model have the same factors: peft leaves missing ones random, and skips unknown ones."""
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, problem in (
        (expected - saved, "missing from the file"),
        (saved - expected, "without a place in the model"),
    ):
        if names:
            raise ModelError(
                f"{folder}: not an adapter of this model ({len(names)} factors are {problem}, first {min(names)})"
            )


def _whole_modules(model: PreTrainedModel, modules_to_save: Sequence[str]) -> list[str]:
    """The full names of `modules_to_save`. Raises ModelError for an unknown or quantized module, or one with a tied weight."""
    modules = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    quantized = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    tied = _tied_modules(model)
    names: list[str] = []
    free = ", ".join(sorted({n.split(".")[-1] for n, module in modules.items() if not isinstance(module, quantized)}))
    for wanted in modules_to_save:
        matches = [name for name in modules if is_named(name, wanted)]
        where = f'lora.modules_to_save: "{wanted}"'
        if not matches:
            raise ModelError(f"{where} matches no module with weights in this model; modules in 16 bits: {free}")
        if any(isinstance(modules[name], quantized) for name in matches):
            raise ModelError(f"{where} is quantized, so it cannot be trained whole; modules in 16 bits: {free}")
        if tied.intersection(matches):
            raise ModelError(
                f"{where}: this model ties its head to its embedding (one weight), and training one of them whole would untie them. "
                "Use method: full, or leave it out"
            )
        names += matches
    return names


def _tied_modules(model: PreTrainedModel) -> set[str]:
    return {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}


def _refuse_meeting_new_tokens(model: PreTrainedModel, names: Sequence[str], has_new_tokens: bool) -> None:
    both = set(names) & set(token_modules(model)) if has_new_tokens else set()
    if both:
        raise ModelError(
            f"data.special_tokens: {min(both)} gets rows for new tokens, but lora.modules_to_save or lora.target_modules names it too. "
            "Leave one of them out"
        )


def _named_targets(model: PreTrainedModel, target_modules: list[str]) -> list[str]:
    """Full names of the linear layers whose names end in one of `target_modules`."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    endings = sorted({name.split(".")[-1] for name in linear})
    for target in target_modules:
        if not any(name == target or name.endswith("." + target) for name in linear):
            other = next((kind for name, kind in kinds.items() if is_named(name, target)), None)
            type_note = f" ({target} is of type {other})" if other else ""
            raise ModelError(
                f'lora.target_modules: "{target}" is not a linear layer of this model{type_note}; its linear layers: {", ".join(endings)}. '
                "Use some of these (names or their endings, not patterns), or all-linear instead of a list"
            )
    names = [name for name in sorted(linear) if any(name == t or name.endswith("." + t) for t in target_modules)]
    tied = sorted(_tied_modules(model).intersection(names))
    if tied:
        raise ModelError(
            f"lora.target_modules: this model ties {tied[0]} to its embedding (one weight), and a merge could change only both. "
            'Leave it out, as "all-linear" does'
        )
    return names
