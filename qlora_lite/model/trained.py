"""What training changes, as files: an adapter in PEFT's format, or, where every weight is trained, an ordinary model folder.

A checkpoint holds one of the two, `adapter/` or `weights/`, and so does a finished run. Names are those that the files have:
PEFT leaves its adapter's name out of them.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_lite.base.companions import copy_companions
from qlora_lite.base.published import published_weights
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import load_config, read_config
from qlora_lite.model.adapter import save_adapter

ADAPTER, WEIGHTS = "adapter", "weights"


def folder_name(model: PeftModel | PreTrainedModel) -> str:
    """`adapter` or `weights`."""
    return ADAPTER if isinstance(model, PeftModel) else WEIGHTS


def trained_parameters(model: PeftModel | PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by the names that they have in the files."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        return trainable
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    return {names[parameter.data_ptr()]: parameter for parameter in trainable.values()}


def save_trained(model: PeftModel | PreTrainedModel, folder: Path, *, base: Path) -> None:
    """Write `folder/adapter` or `folder/weights`; plain peft or plain transformers reads it. `base` is the base's folder."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder / ADAPTER, base_name=str(base))
        return
    out = folder / WEIGHTS
    model.save_pretrained(str(out))
    _write_config(model, base, out)
    copy_companions(base, out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors creates files only their owner may read


def _write_config(model: PreTrainedModel, base: Path, out: Path) -> None:
    """The base's own config.json: the live one has dropout switched off and our attention."""
    own = {"dtype": str(model.dtype).removeprefix("torch."), "vocab_size": model.config.vocab_size}
    own["tie_word_embeddings"] = model.config.tie_word_embeddings
    config = {key: value for key, value in read_config(base).items() if key != "torch_dtype"} | own
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def load_trained(model: PeftModel | PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What `save_trained` wrote into `folder`, by the same names as `trained_parameters`."""
    if isinstance(model, PeftModel):
        return load_file(folder / ADAPTER / "adapter_model.safetensors")
    out = folder / WEIGHTS
    tensors = published_weights(out, empty_model(load_config(out))).tensors
    return {name: tensor.value() for name, tensor in tensors.items()}


def make_trainable(model: PreTrainedModel) -> None:
    """Every weight is trained; gradients are fp32, so that those of many micro-batches add up without loss."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad_dtype = torch.float32
