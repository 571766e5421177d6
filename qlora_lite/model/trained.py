"""The trained parameters as files: an adapter in PEFT's format or, with method full, an ordinary model folder.

A checkpoint and a finished run hold one of the two, `adapter/` or `weights/`. Parameter names are those of the files, where PEFT omits
its adapter's name.
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
from qlora_lite.files.library_names import CONFIG_FILE, FACTORS_FILE
from qlora_lite.model.adapter import save_adapter

ADAPTER, WEIGHTS = "adapter", "weights"


def folder_name(model: PeftModel | PreTrainedModel) -> str:
    """The folder of the trained parameters: `adapter` or `weights`."""
    return ADAPTER if isinstance(model, PeftModel) else WEIGHTS


def trained_parameters(model: PeftModel | PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by their names in the files."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        return trainable
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    return {names[parameter.data_ptr()]: parameter for parameter in trainable.values()}


def save_trained(model: PeftModel | PreTrainedModel, folder: Path, *, base: Path) -> None:
    """Write `folder/adapter` or `folder/weights`, for plain peft or plain transformers. `base` is the base's folder."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder / ADAPTER, base_name=str(base))
        return
    out = folder / WEIGHTS
    model.save_pretrained(str(out))
    _write_config(model, base, out)
    copy_companions(base, out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors creates files that only their owner may read


def _write_config(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Write the base's own config.json: the live config has dropout switched off and our attention."""
    own = {"dtype": str(model.dtype).removeprefix("torch."), "vocab_size": model.config.vocab_size}
    own["tie_word_embeddings"] = model.config.tie_word_embeddings
    config = {key: value for key, value in read_config(base).items() if key != "torch_dtype"} | own
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_trained(model: PeftModel | PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors that `save_trained` wrote to `folder`, with the names of `trained_parameters`."""
    if isinstance(model, PeftModel):
        return load_file(folder / ADAPTER / FACTORS_FILE)
    out = folder / WEIGHTS
    tensors = published_weights(out, empty_model(load_config(out))).tensors
    return {name: tensor.value() for name, tensor in tensors.items()}


def make_trainable(model: PreTrainedModel) -> None:
    """Make every weight trainable, with fp32 gradients, so that those of many micro-batches sum without loss."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad_dtype = torch.float32
