"""A tiny random Llama as `save_pretrained` writes it, its NF4 artefact, and rows to train it on. Made once per test run."""

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lite.base.artefact import quantize_base
from qlora_lite.data.batches import Batch, pack_batch
from qlora_lite.data.rows import QuestionRow
from qlora_lite.data.template import Encoded
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.load import LoadedBase, load_base
from qlora_lite.training.step import forward_backward
from tests.data.tiny_tokenizer import make_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
NUM_LINEAR = SIZES["num_hidden_layers"] * 7  # q, k, v, o, gate, up, down
UNEQUAL_LABELS = (1, 30, 1, 2, 1, 25, 1, 1, 3, 1, 30, 1, 2, 1, 1, 7)  # of 16 examples


def save_tiny_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A 16-bit model folder with a tokenizer; `changes` go into its config."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer)} | SIZES | changes)).bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def tiny_source() -> Path:
    """A 16-bit folder that all tests share: read only."""
    root = Path(tempfile.mkdtemp(prefix="qlora-lite-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save_tiny_llama(root / "tiny")


@functools.cache
def tiny_artefact() -> Path:
    """The NF4 artefact of `tiny_source`, shared by all tests: read only."""
    return quantize_base(tiny_source(), cache=tiny_source().parent / "cache")


def tiny_base(*, compute: torch.dtype = torch.bfloat16) -> LoadedBase:
    """A fresh frozen 4-bit model."""
    return load_base(tiny_artefact(), device="cpu", compute=compute)


def tiny_adapted(
    *, compute: torch.dtype = torch.bfloat16, factors: torch.dtype = torch.bfloat16, moved: bool = True, r: int = 4
) -> PeftModel:
    """A fresh 4-bit model with an adapter; `moved`: with factors B that are not zero, as after some training."""
    model = attach_adapter(tiny_base(compute=compute).model, Lora(r=r, lora_alpha=2 * r), factor_dtype=factors)
    if moved:
        move_factors(model)
    return model


def move_factors(model: PeftModel, *, std: float = 0.02) -> None:
    """Random B, so that every factor has a gradient and the adapter an effect."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def set_dropout(model: PeftModel, probability: float) -> None:
    """Dropout before the factors, where peft puts nothing for a probability of 0."""
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(probability)


class Rows:
    """Examples in memory, with what batching and the loop ask of `Examples`."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = list(encoded)
        self.lengths = np.array([len(example.input_ids) for example in encoded])

    def __len__(self) -> int:
        return len(self._encoded)

    def encoded(self, index: int) -> Encoded:
        return self._encoded[index]

    def row(self, index: int) -> QuestionRow:
        return QuestionRow(f"row-{index}", "context", "question", ("answer",))


def random_rows(labels: Sequence[int], *, vocab: int = 300, prompt: tuple[int, int] = (5, 20), seed: int = 0) -> Rows:
    """One example for each number of labels, behind a random prompt of `prompt[0]` to `prompt[1]` tokens."""
    rng = random.Random(seed)
    examples = []
    for num_labels in labels:
        length = rng.randint(*prompt)
        end = length + num_labels
        examples.append(Encoded([rng.randrange(3, vocab) for _ in range(end)], ((length, end),)))
    return Rows(examples)


def split_batches(rows: Rows, num_batches: int) -> list[Batch]:
    """The rows in order, in `num_batches` micro-batches of equally many examples."""
    size = len(rows) // num_batches
    assert size * num_batches == len(rows)
    groups = [range(start, start + size) for start in range(0, len(rows), size)]
    return [pack_batch([rows.encoded(i) for i in group], group) for group in groups]


def gradients(model: PeftModel, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The gradient of one step by training's own code, by parameter name; the model is left without gradients."""
    model.train()
    forward_backward(model, batches)
    return take_gradients(model)


def take_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """|left - right| / |right| of the whole vectors, in fp64."""
    assert left.keys() == right.keys()
    difference = sum((left[name].double() - right[name].double()).square().sum().item() for name in left)
    return (difference / sum(right[name].double().square().sum().item() for name in right)) ** 0.5


def linear4bit_layers(model: torch.nn.Module) -> dict[str, Any]:
    from qlora_lite.base.bnb import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
