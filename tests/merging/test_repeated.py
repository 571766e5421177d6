"""A change that is merged in five parts, one into the outcome of the other, must not drift from the whole change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.merging.lora import read_adapter
from qlora_lite.merging.write import MergeOptions
from tests.merged import merge_adapter
from tests.merging.test_spectrum import dense
from tests.tiny_model import tiny_source

NUM_TIMES = 5


def merged_again_and_again(base: Path, adapter: Path, folder: Path, rounding: str) -> dict[str, torch.Tensor]:
    """The weights after `NUM_TIMES` merges of a fifth of the change each."""
    for number in range(NUM_TIMES):
        out = folder / f"{rounding}-{number}"
        merge_adapter(base, adapter, out, options=MergeOptions(rounding=rounding, scale=1 / NUM_TIMES, seed=number))
        base = out
    return load_file(base / "model.safetensors")


@pytest.fixture
def small_change(make_adapter: Callable[..., Path]) -> Path:
    """A change a few times smaller than the step of the bf16 grid."""
    folder = make_adapter(
        shapes={"model.layers.0.mlp.down_proj": (64, 192), "model.layers.1.self_attn.q_proj": (64, 64)}
    )
    path = folder / "adapter_model.safetensors"
    save_file({n: t * 0.01 if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    return folder


def test_a_repeated_merge_does_not_drift_and_nearest_rounding_would(small_change: Path, tmp_path: Path) -> None:
    before = load_file(tiny_source() / "model.safetensors")
    kept = {}
    for rounding in ("stochastic", "nearest"):
        after = merged_again_and_again(tiny_source(), small_change, tmp_path, rounding)
        along, size = 0.0, 0.0
        for module, factors in read_adapter(small_change).factors.items():
            change = dense(factors)
            moved = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
            along += (moved * change).sum().item()
            size += change.square().sum().item()
        kept[rounding] = along / size  # how much of the change is there, along the change itself
    assert kept["stochastic"] == pytest.approx(1.0, abs=0.1)
    assert kept["nearest"] < 0.7
