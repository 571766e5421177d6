"""Item 6: gradients of the card against those of the CPU, of a tree against its rows, of one micro-batch against four."""

from collections.abc import Sequence

import torch

from gpu.common import Found, device
from qlora_lite.data.batches import Batch, pack_batch, pack_trees
from qlora_lite.data.template import Encoded
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.load import load_base
from tests import tiny_model


def gradients() -> Found:
    """In fp32: the card's against the CPU's, a tree's against its rows', one micro-batch against four; in bf16 the first again."""
    rows = tiny_model.random_rows([3, 9, 1, 5])
    by_device = {place: _gradients(place, rows, 1, torch.float32) for place in ("cpu", device())}
    found = {"fp32_card_against_cpu": tiny_model.relative_difference(by_device[device()], by_device["cpu"])}
    split = _gradients(device(), rows, 4, torch.float32)
    found["one_against_four_micro_batches"] = tiny_model.relative_difference(split, by_device[device()])
    shared = _sharing_rows()
    tree = _gradients_of(device(), [pack_trees(shared, range(len(shared)))], torch.float32)
    alone = _gradients_of(
        device(), [pack_batch([shared.encoded(i) for i in range(len(shared))], range(len(shared)))], torch.float32
    )
    found["tree_against_rows"] = tiny_model.relative_difference(tree, alone)
    found["bf16_against_fp32"] = tiny_model.relative_difference(
        _gradients(device(), rows, 1, torch.bfloat16), by_device["cpu"]
    )
    assert found["fp32_card_against_cpu"] < 1e-3 and found["one_against_four_micro_batches"] < 1e-4, found
    assert found["tree_against_rows"] < 1e-4 and found["bf16_against_fp32"] < 0.1, found
    return found


def _sharing_rows() -> tiny_model.Rows:
    passage = list(range(3, 43))
    return tiny_model.Rows([Encoded([*passage, *range(50 + 7 * i, 57 + 7 * i)], ((44, 47),)) for i in range(4)])


def _gradients(place: str, rows: tiny_model.Rows, num_batches: int, compute: torch.dtype) -> dict[str, torch.Tensor]:
    return _gradients_of(place, tiny_model.split_batches(rows, num_batches), compute)


def _gradients_of(place: str, batches: Sequence[Batch], compute: torch.dtype) -> dict[str, torch.Tensor]:
    base = load_base(tiny_model.tiny_artefact(), device=place, compute=compute)
    model = attach_adapter(base.model, Lora(r=4, lora_alpha=8), factor_dtype=compute)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the same factors on both devices
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    found = tiny_model.gradients(model, [batch.to(place) for batch in batches])
    return {name: gradient.cpu() for name, gradient in found.items()}
