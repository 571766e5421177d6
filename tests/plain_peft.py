"""What plain transformers and plain peft make of our files, beside what we make of them ourselves."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_lite.model.adapter import load_adapter, save_adapter
from qlora_lite.model.bnb import keep_weights_unpacked


def assert_plain_peft_computes_the_same(
    model: PeftModel,
    fresh_base: torch.nn.Module,
    ids: list[int],
    *,
    base: Path,
    folder: Path,
    num_tokens: int | None = None,
    rtol: float = 0.0,
    atol: float = 0.02,
) -> None:
    """Save `model`'s adapter into `folder`; ours read again gives equal logits, peft's on the folder `base` close ones.

    `fresh_base` is the base as we load it, `num_tokens` what peft's user makes room for first.
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
    for one in (model, again):
        one.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        ours, read, plainly = (
            one.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits for one in (model, again, theirs)
        )
    assert torch.equal(read, ours)
    torch.testing.assert_close(plainly, ours, rtol=rtol, atol=atol)
