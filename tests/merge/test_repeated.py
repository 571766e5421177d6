"""A change that is merged in five parts, one into the outcome of the other, must not drift from the whole change."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.merge.lora import read_adapter
from qlora_lite.merge.write import merge_adapter
from tests.merge.test_spectrum import dense

NUM_TIMES = 5


def merged_again_and_again(base: Path, adapter: Path, folder: Path, rounding: str) -> dict[str, torch.Tensor]:
    """The weights after `NUM_TIMES` merges of a fifth of the change each."""
    for number in range(NUM_TIMES):
        out = folder / f"{rounding}-{number}"
        merge_adapter(base, adapter, out, rounding=rounding, scale=1 / NUM_TIMES, seed=number)
        shutil.copy(base / "config.json", out / "was.json")
        base = out
    return load_file(base / "model.safetensors")


@pytest.fixture
def small_change(make_adapter) -> Path:
    """A change a few times smaller than the step of the bf16 grid."""
    folder = make_adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({n: t * 0.02 if "lora_B" in n else t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def test_a_repeated_merge_does_not_drift_and_nearest_rounding_would(
    base_dir: Path, small_change: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    merge_adapter(base_dir, small_change, start, scale=0.0)
    before = load_file(start / "model.safetensors")
    assert json.loads((start / "config.json").read_text())["dtype"] == "bfloat16"
    kept = {}
    for rounding in ("stochastic", "nearest"):
        after = merged_again_and_again(start, small_change, tmp_path, rounding)
        along, size = 0.0, 0.0
        for module, factors in read_adapter(small_change).factors.items():
            change = dense(factors)
            moved = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
            along += (moved * change).sum().item()
            size += change.square().sum().item()
        kept[rounding] = along / size  # how much of the change is there, along the change itself
    assert kept["stochastic"] == pytest.approx(1.0, abs=0.1)
    assert kept["nearest"] < 0.7
