"""What plain transformers and plain peft make of our files, beside what we make of them ourselves."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_lite.base.bnb import bitsandbytes, keep_weights_unpacked
from qlora_lite.model.adapter import load_adapter, save_adapter


def assert_plain_peft_computes_the_same(
    model: PeftModel,
    fresh_base: torch.nn.Module,
    ids: list[int],
    *,
    base: Path,
    folder: Path,
    num_tokens: int | None = None,
    rtol: float = 0.0,
    atol: float = 1e-4,
) -> None:
    """Save `model`'s adapter into `folder`; ours read again gives equal logits, peft's on the folder `base` close ones.

    `fresh_base` is the base as we load it, `num_tokens` what peft's user makes room for first. All three compute in fp32 from
    then on: in bf16 peft rounds once more in each layer (model/tuned_linear.py).
    """
    save_adapter(model, folder, base_name=str(base))
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16, device_map="cpu")
    if num_tokens is not None:
        plain.resize_token_embeddings(num_tokens, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of factors that are missing or left over
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = PeftModel.from_pretrained(plain, str(folder), autocast_adapter_dtype=False).eval()
    keep_weights_unpacked(theirs)
    again = load_adapter(fresh_base, folder).eval()
    for one in (model, again, theirs):
        one.get_base_model().set_attn_implementation("sdpa")
        compute_in_fp32(one)
    with torch.no_grad():
        ours, read, plainly = (
            one.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits for one in (model, again, theirs)
        )
    assert torch.equal(read, ours)
    torch.testing.assert_close(plainly, ours, rtol=rtol, atol=atol)


def compute_in_fp32(model: torch.nn.Module) -> None:
    """Widen what `model` holds in 16 bits, and what its 4-bit layers dequantize to."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
